_base_ = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_2x_coco.py'
model = dict(
    _delete_=True,
    type='mmkd.Distill',
    student=_base_.model,
    teacher='mmdet::faster_rcnn/faster-rcnn_r101_fpn_2x_coco.py',
    distillers=dict(
        cankd=dict(
            type='CanKD', layer=['neck.fpn_convs.0', 'neck.fpn_convs.1', 'neck.fpn_convs.2', 'neck.fpn_convs.3'])),
    inherit=['neck', 'roi_head.bbox_head'])
optim_wrapper = dict(clip_grad=dict(max_norm=35, norm_type=2))
