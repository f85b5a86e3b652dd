_base_ = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'
model = dict(
    _delete_=True,
    type='mmkd.Distill',
    student=_base_.model,
    teacher='mmdet::faster_rcnn/faster-rcnn_r101_fpn_ms-3x_coco.py',
    distillers=dict(
        icd=dict(type='ICD', loss_weight=dict(type='constant', value=3.0, begin=1000), max_instances=100)),
    inherit=['neck', 'rpn_head', 'roi_head'])
load, boxes, _, flip, pack = _base_.train_pipeline
resize = dict(
    type='RandomChoiceResize',
    scales=[(1333, 640), (1333, 672), (1333, 704), (1333, 736), (1333, 768), (1333, 800)],
    keep_ratio=True)
train_dataloader = dict(dataset=dict(pipeline=[load, boxes, resize, flip, pack]))
# the decoder's rate of 0.003, by the name of its entry
optim_wrapper = dict(
    clip_grad=dict(max_norm=35, norm_type=2),
    paramwise_cfg=dict(custom_keys={'distillers.icd': dict(lr_mult=0.15)}))
