_base_ = 'pspnet_student.py'
model = dict(
    _delete_=True,
    type='mmkd.Distill',
    student=_base_.model,
    teacher=dict(config='mmkd::streets/pspnet_teacher.py', checkpoint='work_dirs/pspnet_teacher/iter_1500.pth'),
    distillers=dict(
        ofd=dict(type='OFD', layer=[*(f'backbone.layer{i}' for i in (1, 2, 3, 4)), 'decode_head.bottleneck'])))
