_base_ = 'mmdet::fcos/fcos_r50-caffe_fpn_gn-head-center-normbbox-centeronreg-giou_1x_coco.py'
model = dict(
    _delete_=True,
    type='mmkd.Distill',
    student=_base_.model,
    teacher='mmdet::fcos/fcos_r101-caffe_fpn_gn-head_ms-640-800-2x_coco.py',
    distillers=dict(
        maskd=dict(type='MasKD', loss_weight=10.0, both_begin=5000, adapter=dict(type='ConvAdapter'))))
optim_wrapper = dict(clip_grad=dict(_delete_=True, max_norm=35, norm_type=2))
