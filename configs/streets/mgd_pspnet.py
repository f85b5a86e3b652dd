_base_ = 'pspnet_student.py'
model = dict(
    _delete_=True,
    type='mmkd.Distill',
    student=_base_.model,
    teacher=dict(config='mmkd::streets/pspnet_teacher.py', checkpoint='work_dirs/pspnet_teacher/iter_1500.pth'),
    distillers=dict(
        # the published 2e-5, for the smaller map of fewer channels: the loss is a sum
        mgd=dict(type='MGD', layer='backbone.layer4', mask_ratio=0.75, loss_weight=3e-3),
        cwd=dict(type='CWD', layer='decode_head.conv_seg', tau=4.0, loss_weight=3.0)))
