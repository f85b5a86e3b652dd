_base_ = 'retinanet_student.py'
model = dict(
    _delete_=True,
    type='mmkd.Distill',
    student=_base_.model,
    teacher=dict(config='mmkd::shapes/retinanet_teacher.py', checkpoint='work_dirs/retinanet_teacher/iter_1500.pth'),
    # The published weights, for 2 images of 800x1333 and 256 channels, times the ratio of the roots of the sums' sizes; not tuned.
    distillers=dict(
        fkd=dict(type='FKD', layer='neck', feature_weight=4.5e-4, spatial_weight=1.3e-2, relation_weight=4.5e-4)))
