_base_ = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_2x_coco.py'
model = dict(
    _delete_=True,
    type='mmkd.Distill',
    student=_base_.model,
    teacher='mmdet::cascade_rcnn/cascade-mask-rcnn_x101-64x4d_fpn_20e_coco.py',
    distillers=dict(mgd=dict(type='MGD', layer='neck', mask_ratio=0.45, loss_weight=5e-7)))
optim_wrapper = dict(clip_grad=dict(max_norm=35, norm_type=2))
