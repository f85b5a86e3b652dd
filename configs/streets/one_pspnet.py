# no teacher: three decode heads on one backbone learn from their own gated ensemble
_base_ = 'pspnet_student.py'
model = dict(
    _delete_=True,
    type='mmkd.Distill',
    student=_base_.model,
    teacher=dict(type='Own'),
    distillers=dict(one=dict(type='ONE', loss_weight=dict(type='linear', value=1.0, end=160))))
