# the first of two trainings; the second is mgd_retinanet_mtpd-x101.py
_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'
model = dict(
    _delete_=True,
    type='mmkd.Distill',
    student=_base_.model,
    teacher='mmdet::retinanet/retinanet_r101_fpn_ms-640-800-3x_coco.py',
    distillers=dict(mgd=dict(type='MGD', layer='neck')),
    inherit=['neck', 'bbox_head'])
optim_wrapper = dict(clip_grad=dict(max_norm=35, norm_type=2))
