_base_ = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'
model = dict(
    _delete_=True,
    type='mmkd.Distill',
    student=_base_.model,
    teacher='mmdet::cascade_rcnn/cascade-rcnn_x101_64x4d_fpn_20e_coco.py',
    distillers=dict(ssim=dict(type='SSIM', layer='neck', adapter=dict(type='ConvAdapter'))))
