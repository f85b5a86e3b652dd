# images of both domains, labels of the day alone
_base_ = 'pspnet_dusk_student.py'
model = dict(
    _delete_=True,
    type='mmkd.Distill',
    student=_base_.model,
    teacher=dict(
        config='mmkd::streets/pspnet_dusk_teacher.py', checkpoint='work_dirs/pspnet_dusk_teacher/iter_1500.pth'),
    distillers=dict(dakd=dict(type='DAKD', critic_channels=32)))
train_dataloader = dict(
    sampler=dict(_delete_=True, type='mmkd.DomainSampler'),
    dataset=dict(_delete_=True, type='ConcatDataset', datasets=[_base_.day, _base_.dusk_unlabelled]))
# the critics' 1e-4
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'dakd.critics': dict(lr_mult=0.033)}))
