_base_ = 'kd_pspnet.py'
model = dict(distillers=dict(_delete_=True, wsld=dict(type='WSLD')))
