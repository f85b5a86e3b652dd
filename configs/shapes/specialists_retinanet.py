# two teachers of three classes each, one student of all six
_base_ = 'retinanet_student.py'
model = dict(
    _delete_=True,
    type='mmkd.Distill',
    student=_base_.model,
    class_names=_base_.metainfo['classes'],
    teacher=dict(
        a=dict(
            config='mmkd::shapes/specialist_a_teacher.py',
            checkpoint='work_dirs/specialist_a_teacher/iter_1500.pth',
            classes=dict(circle='circle', ring='ring', square='square')),
        b=dict(
            config='mmkd::shapes/specialist_b_teacher.py',
            checkpoint='work_dirs/specialist_b_teacher/iter_1500.pth',
            classes=dict(triangle='triangle', star='star', cross='cross'))),
    distillers=dict(kd=dict(type='KD', teacher=['a', 'b'], combine='entropy')))
