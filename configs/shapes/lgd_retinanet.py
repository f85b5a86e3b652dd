# no teacher: it is made of the labels; at first it is trained alone, as long as the authors do, a sixth of all steps
_base_ = 'retinanet_student.py'
model = dict(
    _delete_=True,
    type='mmkd.Distill',
    student=_base_.model,
    teacher=dict(type='Own'),
    distillers=dict(lgd=dict(type='LGD', loss_weight=dict(type='constant', value=1.0, begin=100))))
