_base_ = 'pspnet_student.py'
model = dict(
    _delete_=True,
    type='mmkd.Distill',
    student=_base_.model,
    teacher=dict(config='mmkd::streets/pspnet_teacher.py', checkpoint='work_dirs/pspnet_teacher/iter_1500.pth'),
    distillers=dict(
        kd=dict(type='KD', loss_weight=dict(type='linear', start=1.0, value=0.0, end=600)),
        aicsd=dict(type='AICSD', loss_weight=dict(type='linear', start=10.0, value=0.0, end=600))))
