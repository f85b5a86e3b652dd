_base_ = 'mmseg::pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024.py'
model = dict(
    _delete_=True,
    type='mmkd.Distill',
    student=_base_.model,
    teacher='mmseg::pspnet/pspnet_r101-d8_4xb2-80k_cityscapes-512x1024.py',
    # the method as published for classification, on all stages; CIRKD's 10000 is for one map beside KD: docs/methods/at.md
    distillers=dict(
        at=dict(type='AT', layer=[f'backbone.layer{i}' for i in (1, 2, 3, 4)], loss_weight=10000.0)))
auto_scale_lr = dict(enable=False, base_batch_size=8)
