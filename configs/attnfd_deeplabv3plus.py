_base_ = 'mmseg::deeplabv3plus/deeplabv3plus_r18-d8_4xb2-80k_cityscapes-512x1024.py'
model = dict(
    _delete_=True,
    type='mmkd.Distill',
    student=_base_.model,
    teacher='mmseg::deeplabv3plus/deeplabv3plus_r101-d8_4xb2-80k_cityscapes-512x1024.py',
    distillers=dict(
        attnfd=dict(
            type='AttnFD', layer=['backbone.layer4', 'decode_head.bottleneck', 'decode_head.sep_bottleneck'])))
auto_scale_lr = dict(enable=False, base_batch_size=8)
