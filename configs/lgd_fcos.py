_base_ = 'mmdet::fcos/fcos_r50-caffe_fpn_gn-head_ms-640-800-2x_coco.py'
model = dict(
    _delete_=True,
    type='mmkd.Distill',
    student=_base_.model,
    teacher=dict(type='Own'),
    distillers=dict(lgd=dict(type='LGD', loss_weight=dict(type='constant', value=1.0, begin=30000))))
