# the tokens are learnt in the first 100 steps
_base_ = 'retinanet_student.py'
model = dict(
    _delete_=True,
    type='mmkd.Distill',
    student=_base_.model,
    teacher=dict(config='mmkd::shapes/retinanet_teacher.py', checkpoint='work_dirs/retinanet_teacher/iter_1500.pth'),
    distillers=dict(
        freekd=dict(type='FreeKD', token_steps=100),
        mse=dict(type='FitNet', layer='neck', loss_weight=5.0)))
