_base_ = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_2x_coco.py'
model = dict(
    _delete_=True,
    type='mmkd.Distill',
    student=_base_.model,
    teacher='mmdet::dcn/cascade-mask-rcnn_x101-32x4d-dconv-c3-c5_fpn_1x_coco.py',
    distillers=dict(
        mgd=dict(
            type='MGD',
            layer=['neck.fpn_convs.0', 'neck.fpn_convs.1', 'neck.fpn_convs.2', 'neck.fpn_convs.3'],
            mask_ratio=0.45,
            loss_weight=5e-7)))
optim_wrapper = dict(clip_grad=dict(max_norm=35, norm_type=2))
