_base_ = 'faster_rcnn_student.py'
model = dict(
    _delete_=True,
    type='mmkd.Distill',
    student=_base_.model,
    teacher=dict(config='mmkd::shapes/faster_rcnn_teacher.py', checkpoint='work_dirs/faster_rcnn_teacher/iter_1500.pth'),
    distillers=dict(defeat=dict(type='DeFeat')))
