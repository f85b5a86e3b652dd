_base_ = 'pspnet_student.py'
model = dict(
    _delete_=True,
    type='mmkd.Distill',
    student=_base_.model,
    teacher=dict(config='mmkd::streets/pspnet_teacher.py', checkpoint='work_dirs/pspnet_teacher/iter_1500.pth'),
    distillers=dict(
        # CIRKD's 10000, as if of crops of 512x512, for the smaller map: the loss is inversely proportional to its area.
        # CIRKD's crops have 512x1024, of which it would be 300
        at=dict(type='AT', layer=[f'backbone.layer{i}' for i in (1, 2, 3, 4)], loss_weight=600.0)))
