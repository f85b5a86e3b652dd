_base_ = 'mmseg::mobilenet_v2/mobilenet-v2-d8_deeplabv3_4xb2-80k_cityscapes-512x1024.py'
model = dict(
    _delete_=True,
    type='mmkd.Distill',
    student=_base_.model,
    teacher='mmseg::deeplabv3/deeplabv3_r101-d8_4xb2-80k_cityscapes-512x1024.py',
    distillers=dict(maskd=dict(type='MasKD', loss_weight=0.5, tokens=8, token_steps=10000, both_begin=None)))
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'tokens': dict(lr_mult=10.0, decay_mult=2.0)}))
auto_scale_lr = dict(enable=False, base_batch_size=8)
