# Two domains: streets by day, which are labelled, and streets at dusk, on which models are evaluated
_base_ = 'pspnet.py'

meta_keys = ('img_path', 'ori_shape', 'img_shape', 'flip', 'domain')
crop = [
    dict(type='RandomCrop', crop_size=(128, 128)),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackSegInputs', meta_keys=meta_keys)
]
day = dict(
    type='CityscapesDataset',
    data_root='data/streets/',
    data_prefix=dict(img_path='leftImg8bit/train', seg_map_path='gtFine/train'),
    pipeline=[dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), *crop])
dusk = dict(
    type='CityscapesDataset',
    data_root='data/streets_dusk/',
    data_prefix=dict(img_path='leftImg8bit/train', seg_map_path='gtFine/train'),
    pipeline=[dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), *crop])
dusk_unlabelled = dict(
    type='CityscapesDataset',
    data_root='data/streets_dusk/',
    data_prefix=dict(img_path='leftImg8bit/train'),
    pipeline=[dict(type='LoadImageFromFile'), dict(type='mmkd.Unlabelled'), *crop])
train_dataloader = dict(dataset=dict(_delete_=True, **day))
val_dataloader = dict(dataset=dict(data_root='data/streets_dusk/'))
test_dataloader = val_dataloader

loss_decode = dict(type='CrossEntropyLoss', use_sigmoid=False, avg_non_ignore=True)
model = dict(
    decode_head=dict(loss_decode=loss_decode),
    auxiliary_head=dict(
        type='FCNHead',
        in_channels=96,
        in_index=2,
        channels=24,
        num_convs=1,
        concat_input=False,
        dropout_ratio=0.1,
        num_classes=19,
        norm_cfg=dict(type='BN'),
        align_corners=False,
        loss_decode=dict(loss_weight=0.1, **loss_decode)))
