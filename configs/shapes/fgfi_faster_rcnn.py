_base_ = 'faster_rcnn_student.py'
model = dict(
    _delete_=True,
    type='mmkd.Distill',
    student=_base_.model,
    teacher=dict(config='mmkd::shapes/faster_rcnn_teacher.py', checkpoint='work_dirs/faster_rcnn_teacher/iter_1500.pth'),
    # Summed over 64 channels instead of 256, and for 600 iterations instead of 24 epochs.
    distillers=dict(fgfi=dict(type='FGFI', loss_weight=dict(type='constant', value=0.04, begin=50))))
