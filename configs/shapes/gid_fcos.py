_base_ = 'fcos_student.py'
model = dict(
    _delete_=True,
    type='mmkd.Distill',
    student=_base_.model,
    teacher=dict(config='mmkd::shapes/fcos_teacher.py', checkpoint='work_dirs/fcos_teacher/iter_3000.pth'),
    distillers=dict(gid=dict(type='GID', feature_weight=5e-3, relation_weight=4.0, cls_weight=0.5)))
