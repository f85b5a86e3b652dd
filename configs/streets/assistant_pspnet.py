# the teacher's assistant teaches
_base_ = 'pspnet_student.py'
model = dict(
    _delete_=True,
    type='mmkd.Distill',
    student=_base_.model,
    teacher=dict(config='mmkd::streets/kd_pspnet_middle.py', checkpoint='work_dirs/kd_pspnet_middle/iter_600.pth'),
    distillers=dict(kd=dict(type='KD')))
