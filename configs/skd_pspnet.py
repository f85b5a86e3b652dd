_base_ = 'mmseg::pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024.py'
model = dict(
    _delete_=True,
    type='mmkd.Distill',
    student=_base_.model,
    teacher='mmseg::pspnet/pspnet_r101-d8_4xb2-80k_cityscapes-512x1024.py',
    distillers=dict(skd=dict(type='SKD')))
# the critic's 4e-4, by the name of its entry
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'distillers.skd.critic': dict(lr_mult=0.04)}))
auto_scale_lr = dict(enable=False, base_batch_size=8)
