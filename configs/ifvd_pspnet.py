_base_ = 'mmseg::pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024.py'
model = dict(
    _delete_=True,
    type='mmkd.Distill',
    student=_base_.model,
    teacher='mmseg::pspnet/pspnet_r101-d8_4xb2-80k_cityscapes-512x1024.py',
    # the authors' losses and weights; their critic has Adam, this one the student's optimizer: docs/methods/ifvd.md
    distillers=dict(
        kd=dict(type='KD', loss_weight=10.0, reduction='element_mean'),
        ifvd=dict(type='IFVD', loss_weight=200.0),
        adversarial=dict(type='SKD', pixel_weight=0.0, pair_weight=0.0, holistic_weight=0.001)))
# the critic's 4e-4, by the name of its entry
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'distillers.adversarial.critic': dict(lr_mult=0.04)}))
auto_scale_lr = dict(enable=False, base_batch_size=8)
