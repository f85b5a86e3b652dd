# the tokens are learnt in the first 100 steps
_base_ = 'retinanet_student.py'
model = dict(
    _delete_=True,
    type='mmkd.Distill',
    student=_base_.model,
    teacher=dict(config='mmkd::shapes/retinanet_teacher.py', checkpoint='work_dirs/retinanet_teacher/iter_1500.pth'),
    distillers=dict(maskd=dict(type='MasKD', loss_weight=7.0, token_steps=100, both_begin=100)))
