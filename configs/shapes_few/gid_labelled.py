# the labelled images alone
_base_ = 'few_student.py'
model = dict(
    _delete_=True,
    type='mmkd.Distill',
    student=_base_.model,
    teacher=dict(config='mmkd::shapes/retinanet_teacher.py', checkpoint='work_dirs/retinanet_teacher/iter_1500.pth'),
    distillers=dict(
        gid=dict(type='GID', feature_weight=5e-3, relation_weight=4.0, cls_weight=0.5, bbox_weight=1.0)))
