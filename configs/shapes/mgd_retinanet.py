_base_ = 'retinanet_student.py'
model = dict(
    _delete_=True,
    type='mmkd.Distill',
    student=_base_.model,
    teacher=dict(config='mmkd::shapes/retinanet_teacher.py', checkpoint='work_dirs/retinanet_teacher/iter_1500.pth'),
    # The published weight, for 800x1333 images and 256 channels, times the ratio of the sums' sizes; not tuned.
    distillers=dict(mgd=dict(type='MGD', layer='neck', loss_weight=3e-3)))
