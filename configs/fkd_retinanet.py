_base_ = 'mmdet::retinanet/retinanet_r50_fpn_2x_coco.py'
model = dict(
    _delete_=True,
    type='mmkd.Distill',
    student=_base_.model,
    teacher='mmdet::retinanet/retinanet_x101-64x4d_fpn_1x_coco.py',
    distillers=dict(
        fkd=dict(
            type='FKD',
            layer='neck',
            # of one-stage detectors: 6 times those of two-stage ones
            feature_weight=4.2e-4,
            channel_weight=2.4e-2,
            spatial_weight=2.4e-2,
            relation_weight=4.2e-4,
            tau=0.1)))
