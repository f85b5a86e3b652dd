_base_ = 'pspnet_student.py'
model = dict(
    _delete_=True,
    type='mmkd.Distill',
    student=_base_.model,
    teacher=dict(config='mmkd::streets/pspnet_teacher.py', checkpoint='work_dirs/pspnet_teacher/iter_1500.pth'),
    distillers=dict(
        kd=dict(type='KD', weight=10.0, reduction='element_mean'),
        ifvd=dict(type='IFVD', weight=200.0),
        adversarial=dict(type='SKD', pixel_weight=0.0, pair_weight=0.0, holistic_weight=0.001)))
# the critic's 4e-4
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'distillers.adversarial.critic': dict(lr_mult=0.13)}))
