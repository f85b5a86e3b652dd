_base_ = 'mmseg::deeplabv3/deeplabv3_r18-d8_4xb2-80k_cityscapes-512x1024.py'
model = dict(
    _delete_=True,
    type='mmkd.Distill',
    student=_base_.model,
    teacher='mmseg::deeplabv3/deeplabv3_r101-d8_4xb2-80k_cityscapes-512x1024.py',
    distillers=dict(
        dist=dict(type='DIST'),
        auxiliary=dict(type='DIST', layer='auxiliary_head.conv_seg', inter_weight=0.4, intra_weight=0.4)))
auto_scale_lr = dict(enable=False, base_batch_size=8)
