_base_ = 'gfl_student.py'
model = dict(
    _delete_=True,
    type='mmkd.Distill',
    student=_base_.model,
    teacher=dict(config='mmkd::shapes/gfl_teacher.py', checkpoint='work_dirs/gfl_teacher/iter_1500.pth'),
    distillers=dict(pgd=dict(type='PGD')))
