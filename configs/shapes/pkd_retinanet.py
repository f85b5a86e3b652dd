_base_ = 'retinanet_student.py'
model = dict(
    _delete_=True,
    type='mmkd.Distill',
    student=_base_.model,
    teacher=dict(config='mmkd::shapes/fcos_teacher.py', checkpoint='work_dirs/fcos_teacher/iter_3000.pth'),
    distillers=dict(pkd=dict(type='PKD', layer='neck')))
