_base_ = 'retinanet_student.py'
model = dict(
    _delete_=True,
    type='mmkd.Distill',
    student=_base_.model,
    teacher=dict(config='mmkd::shapes/retinanet_teacher.py', checkpoint='work_dirs/retinanet_teacher/iter_1500.pth'),
    # The published weights, for 800x1333 images and 256 channels, times the ratio of the sums' sizes; not tuned.
    distillers=dict(
        fgd=dict(type='FGD', foreground_weight=4e-3, background_weight=2e-3, attention_weight=2e-2, global_weight=8e-4)))
