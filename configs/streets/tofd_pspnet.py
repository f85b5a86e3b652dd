_base_ = 'pspnet_auxiliary_student.py'
model = dict(
    _delete_=True,
    type='mmkd.Distill',
    student=_base_.model,
    teacher=dict(
        config='mmkd::streets/pspnet_auxiliary_teacher.py',
        checkpoint='work_dirs/pspnet_auxiliary_teacher/iter_1500.pth'),
    distillers=dict(
        tofd=dict(type='TOFD'),
        kd=dict(type='KD'),
        auxiliary=dict(type='KD', layer='auxiliary_head.conv_seg')))
