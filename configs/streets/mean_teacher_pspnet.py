# no teacher but the student's own average
_base_ = 'pspnet_student.py'
model = dict(
    _delete_=True,
    type='mmkd.Distill',
    student=_base_.model,
    teacher=dict(mean=dict(type='Average', momentum=0.99)),
    distillers=dict(kd=dict(type='KD', loss_weight=dict(type='linear', value=1.0, end=200))))
