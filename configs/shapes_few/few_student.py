# one image in ten is labelled
_base_ = '../shapes/retinanet_student.py'
labelled = dict(
    type='CocoDataset',
    data_root=_base_.data_root,
    metainfo=_base_.metainfo,
    ann_file='annotations/train.json',
    data_prefix=dict(img='train/'),
    indices=60,
    pipeline=[
        dict(type='LoadImageFromFile'),
        dict(type='LoadAnnotations', with_bbox=True),
        dict(type='RandomFlip', prob=0.5),
        dict(type='PackDetInputs')
    ])
train_dataloader = dict(dataset=labelled)
