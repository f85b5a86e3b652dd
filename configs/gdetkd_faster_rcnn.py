_base_ = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_2x_coco.py'
model = dict(
    _delete_=True,
    type='mmkd.Distill',
    student=_base_.model,
    teacher='mmdet::faster_rcnn/faster-rcnn_x101-64x4d_fpn_2x_coco.py',
    distillers=dict(gdetkd=dict(type='GDetKD', cls_weight=1.0, bbox_weight=1.0)),
    inherit=['roi_head'])
