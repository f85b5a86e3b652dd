# the tokens are learnt in the first 100 steps
_base_ = 'pspnet_student.py'
model = dict(
    _delete_=True,
    type='mmkd.Distill',
    student=_base_.model,
    teacher=dict(config='mmkd::streets/pspnet_teacher.py', checkpoint='work_dirs/pspnet_teacher/iter_1500.pth'),
    distillers=dict(maskd=dict(type='MasKD', loss_weight=0.5, tokens=8, token_steps=100, both_begin=None)))
