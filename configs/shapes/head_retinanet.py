_base_ = 'retinanet_student.py'
model = dict(
    _delete_=True,
    type='mmkd.Distill',
    student=_base_.model,
    teacher=dict(config='mmkd::shapes/faster_rcnn_teacher.py', checkpoint='work_dirs/faster_rcnn_teacher/iter_1500.pth'),
    # as many regions as the teacher's RoI head; the weights rise as the learning rate does
    distillers=dict(
        head=dict(
            type='HEAD',
            regions_per_image=64,
            candidates=150,
            akd_weight=dict(type='linear', value=2.0, end=50),
            ckd_weight=dict(type='linear', value=2.0, end=50))))
