_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'
model = dict(
    _delete_=True,
    type='mmkd.Distill',
    student=_base_.model,
    teacher='mmdet::fcos/fcos_x101-64x4d_fpn_gn-head_ms-640-800-2x_coco.py',
    distillers=dict(
        pkd=dict(
            type='PKD', layer=['neck.fpn_convs.0', 'neck.fpn_convs.1', 'neck.fpn_convs.2', 'neck.fpn_convs.3'], loss_weight=10)))
