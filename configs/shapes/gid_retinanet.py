_base_ = 'retinanet_student.py'
model = dict(
    _delete_=True,
    type='mmkd.Distill',
    student=_base_.model,
    teacher=dict(config='mmkd::shapes/retinanet_teacher.py', checkpoint='work_dirs/retinanet_teacher/iter_1500.pth'),
    # Tuned for 160x160 images with 6 classes; the published weights, for 800x1333 and 80, gain two thirds as much here.
    distillers=dict(
        gid=dict(type='GID', feature_weight=5e-3, relation_weight=4.0, cls_weight=0.5, bbox_weight=1.0)))
