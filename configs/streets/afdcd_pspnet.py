_base_ = 'pspnet_student.py'
model = dict(
    _delete_=True,
    type='mmkd.Distill',
    student=_base_.model,
    teacher=dict(config='mmkd::streets/pspnet_teacher.py', checkpoint='work_dirs/pspnet_teacher/iter_1500.pth'),
    distillers=dict(
        kd=dict(type='KD'),
        # the published 2e-6 and 0.07, for the smaller map of fewer channels: a sum over these, and over those of a group
        afdcd=dict(type='AfDCD', layer='backbone.layer4', feature_weight=7e-4, tau=0.0066)))
