_base_ = 'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py'
_base_.model.backbone.frozen_stages = 0  # the stem alone: the first stage learns as well
model = dict(
    _delete_=True,
    type='mmkd.Distill',
    student=_base_.model,
    teacher='mmdet::retinanet/retinanet_r50_fpn_1x_coco.py',
    distillers=dict(matching=dict(type='MatchingGuided', layer=[f'backbone.layer{i}' for i in (1, 2, 3, 4)])))
