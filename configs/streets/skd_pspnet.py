_base_ = 'pspnet_student.py'
model = dict(
    _delete_=True,
    type='mmkd.Distill',
    student=_base_.model,
    teacher=dict(config='mmkd::streets/pspnet_teacher.py', checkpoint='work_dirs/pspnet_teacher/iter_1500.pth'),
    distillers=dict(skd=dict(type='SKD')))
# the critic's 4e-4; one norm over both networks would be the critic's, which is far larger
optim_wrapper = dict(
    clip_grad=None, paramwise_cfg=dict(custom_keys={'distillers.skd.critic': dict(lr_mult=0.13)}))
