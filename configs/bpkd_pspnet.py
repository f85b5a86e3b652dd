_base_ = 'mmseg::pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024.py'
model = dict(
    _delete_=True,
    type='mmkd.Distill',
    student=_base_.model,
    teacher='mmseg::pspnet/pspnet_r101-d8_4xb2-80k_cityscapes-512x1024.py',
    # masks and weights are ours: docs/methods/bpkd.md
    distillers=dict(bpkd=dict(type='BPKD')))
auto_scale_lr = dict(enable=False, base_batch_size=8)
