_base_ = 'kd_pspnet.py'
model = dict(distillers=dict(_delete_=True, trust=dict(type='Trust')))
