# the first of two trainings: the encoder of labels, with a detector; 1x and 30000 steps more, as the authors have it
_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'
model = dict(
    _delete_=True,
    type='mmkd.Distill',
    student=_base_.model,
    teacher=dict(type='LabelEncoder'),
    distillers=dict(labelenc=dict(type='LabelEnc', loss_weight=dict(type='constant', value=1.0, begin=30000))))
train_cfg = dict(max_epochs=16)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type='MultiStepLR', begin=0, end=16, by_epoch=True, milestones=[12, 15], gamma=0.1)
]
