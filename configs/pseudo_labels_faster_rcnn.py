# train2017 with its labels, and unlabeled2017, which the teacher labels; as Soft Teacher, with a frozen teacher
_base_ = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'
model = dict(
    _delete_=True,
    type='mmkd.Distill',
    student=_base_.model,
    teacher=dict(config='mmdet::faster_rcnn/faster-rcnn_r101_fpn_2x_coco.py', view='weak'),
    pseudo_labels=dict(score=0.9, weight=2.0),
    distillers=dict())
load, boxes, resize, flip, _ = _base_.train_pipeline
pack = dict(type='PackDetInputs', meta_keys=('img_path', 'ori_shape', 'img_shape', 'scale_factor', 'domain', 'weak'))
strong = [flip, dict(type='mmkd.KeepView'), dict(type='PhotoMetricDistortion'), pack]
labelled = dict(_base_.train_dataloader.dataset, pipeline=[load, boxes, resize, *strong])
unlabelled = dict(
    type='mmkd.Images', like='CocoDataset', data_root='data/coco/', data_prefix=dict(img_path='unlabeled2017'),
    pipeline=[load, dict(type='mmkd.Unlabelled'), resize, *strong])
train_dataloader = dict(
    batch_size=4, batch_sampler=None, sampler=dict(_delete_=True, type='mmkd.DomainSampler'),
    dataset=dict(_delete_=True, type='ConcatDataset', datasets=[labelled, unlabelled]))
train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=180000, val_interval=10000)
param_scheduler = [dict(type='MultiStepLR', by_epoch=False, milestones=[120000, 165000], gamma=0.1)]
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=10000))
