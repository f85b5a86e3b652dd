_base_ = 'mmseg::pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024.py'
model = dict(
    _delete_=True,
    type='mmkd.Distill',
    student=_base_.model,
    teacher='mmseg::pspnet/pspnet_r101-d8_4xb2-80k_cityscapes-512x1024.py',
    # for what 50 stands in other code: docs/methods/cwd.md
    distillers=dict(
        cwd=dict(
            type='CWD', layer='decode_head.bottleneck', tau=4.0, loss_weight=50.0,
            adapter=dict(type='ConvAdapter', bias=False, norm=True, relu=True))))
auto_scale_lr = dict(enable=False, base_batch_size=8)
