_base_ = 'pspnet_student.py'
model = dict(
    _delete_=True,
    type='mmkd.Distill',
    student=_base_.model,
    teacher=dict(config='mmkd::streets/pspnet_teacher.py', checkpoint='work_dirs/pspnet_teacher/iter_1500.pth'),
    distillers=dict(crcd=dict(type='CRCD', layer='decode_head.bottleneck')))
