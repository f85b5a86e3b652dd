_base_ = 'retinanet_student.py'
model = dict(
    _delete_=True,
    type='mmkd.Distill',
    student=_base_.model,
    teacher=dict(config='mmkd::shapes/retinanet_teacher.py', checkpoint='work_dirs/demo/teacher/iter_1500.pth'),
    # The published weights suit 800x1333 images and 80 classes; on 160x160 images with 6 they give no gain.
    distillers=dict(
        gid=dict(type='GID', feature_weight=5e-3, relation_weight=4.0, class_weight=0.5, box_weight=1.0)))
