# as many labelled images as unlabelled ones in a batch
_base_ = 'gid_labelled.py'
unlabelled = dict(
    type='mmkd.Images',
    like='CocoDataset',
    metainfo=_base_.metainfo,
    data_prefix=dict(img_path=_base_.data_root + 'train'),
    pipeline=[
        dict(type='LoadImageFromFile'),
        dict(type='mmkd.Unlabelled'),
        dict(type='RandomFlip', prob=0.5),
        dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'domain'))
    ])
train_dataloader = dict(
    sampler=dict(_delete_=True, type='mmkd.DomainSampler'),
    dataset=dict(_delete_=True, type='ConcatDataset', datasets=[_base_.labelled, unlabelled]))
