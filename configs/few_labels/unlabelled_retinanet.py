# learns from the teacher on the other images as well: half of each batch
_base_ = 'kd_retinanet.py'
load, _, flip, _ = _base_.train_dataloader['dataset']['pipeline']
meta_keys = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'domain')
unlabelled = dict(
    _base_.train_dataloader['dataset'],
    indices=list(range(100, 1000)),
    pipeline=[load, dict(type='mmkd.Unlabelled'), flip, dict(type='PackDetInputs', meta_keys=meta_keys)])
train_dataloader = dict(
    sampler=dict(_delete_=True, type='mmkd.DomainSampler'),
    dataset=dict(_delete_=True, type='ConcatDataset', datasets=[_base_.labelled, unlabelled]))
