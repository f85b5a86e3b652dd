_base_ = 'kd_pspnet.py'
model = dict(distillers=dict(_delete_=True, nst=dict(type='NST', layer='backbone.layer4')))
