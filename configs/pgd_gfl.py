_base_ = 'mmdet::gfl/gfl_r50_fpn_1x_coco.py'
model = dict(
    _delete_=True,
    type='mmkd.Distill',
    student=_base_.model,
    teacher='mmdet::gfl/gfl_r101_fpn_ms-2x_coco.py',
    distillers=dict(pgd=dict(type='PGD')),
    inherit=['neck', 'bbox_head'])
optim_wrapper = dict(clip_grad=dict(max_norm=35, norm_type=2))
