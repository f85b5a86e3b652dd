# learning without forgetting: KD of the old classes in place of ERD
_base_ = 'erd_gfl.py'
model = dict(distillers=dict(_delete_=True, kd=dict(type='KD')))
