_base_ = 'segformer_student.py'
model = dict(
    _delete_=True,
    type='mmkd.Distill',
    student=_base_.model,
    teacher=dict(config='mmkd::streets/segformer_teacher.py', checkpoint='work_dirs/segformer_teacher/iter_1500.pth'),
    distillers=dict(transkd=dict(type='TransKD')))
