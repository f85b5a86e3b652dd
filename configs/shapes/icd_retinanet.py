# the student learns from the decoder once this has learnt for 100 steps, at a tenth of the student's rate
_base_ = 'retinanet_student.py'
model = dict(
    _delete_=True,
    type='mmkd.Distill',
    student=_base_.model,
    teacher=dict(config='mmkd::shapes/retinanet_teacher.py', checkpoint='work_dirs/retinanet_teacher/iter_1500.pth'),
    distillers=dict(icd=dict(type='ICD', loss_weight=dict(type='constant', value=8.0, begin=100))))
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'distillers.icd': dict(lr_mult=0.1)}))
