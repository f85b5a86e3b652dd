# no teacher: three more decode heads on the backbone learn from each other, and the student's own from their mean
_base_ = 'pspnet_student.py'
model = dict(
    _delete_=True,
    type='mmkd.Distill',
    student=_base_.model,
    teacher=dict(type='Own'),
    distillers=dict(okddip=dict(type='OKDDip', loss_weight=dict(type='linear', value=1.0, end=160))))
