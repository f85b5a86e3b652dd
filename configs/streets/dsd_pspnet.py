_base_ = 'pspnet_student.py'
model = dict(
    _delete_=True,
    type='mmkd.Distill',
    student=_base_.model,
    teacher=dict(config='mmkd::streets/pspnet_teacher.py', checkpoint='work_dirs/pspnet_teacher/iter_1500.pth'),
    distillers=dict(
        kd=dict(type='KD'),
        # the published 1000 and 10, for the smaller map: the losses fall with its area and with the square of that
        dsd=dict(type='DSD', auxiliary_layer='backbone.layer3', pixel_weight=31.0, category_weight=0.01)))
