_base_ = 'mmdet::retinanet/retinanet_r50_fpn_2x_coco.py'
model = dict(
    _delete_=True,
    type='mmkd.Distill',
    student=_base_.model,
    teacher='mmdet::retinanet/retinanet_r101_fpn_2x_coco.py',
    distillers=dict(maskd=dict(type='MasKD', loss_weight=7.0, adapter=dict(type='ConvAdapter'))),
    inherit=['neck', 'bbox_head'])
optim_wrapper = dict(optimizer=dict(lr=0.02), clip_grad=dict(max_norm=35, norm_type=2))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(type='MultiStepLR', by_epoch=True, begin=0, end=24, milestones=[16, 22], gamma=0.1)]
