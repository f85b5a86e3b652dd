_base_ = 'mmseg::deeplabv3/deeplabv3_r18-d8_4xb2-80k_cityscapes-512x1024.py'

# target pixels have no labels: the student's own losses are means over the source's alone
student = _base_.model
student.decode_head.loss_decode.avg_non_ignore = True
student.auxiliary_head.loss_decode.update(avg_non_ignore=True, loss_weight=0.1)

# this teacher has learnt the target's labels; without them, one that is adapted to the target:
# teacher=dict(config='mmseg::deeplabv3/...', checkpoint='...')
model = dict(
    _delete_=True,
    type='mmkd.Distill',
    student=student,
    teacher='mmseg::deeplabv3/deeplabv3_r101-d8_4xb2-80k_cityscapes-512x1024.py',
    distillers=dict(dakd=dict(type='DAKD')))

meta_keys = ('img_path', 'ori_shape', 'img_shape', 'flip', 'domain')
last = [dict(type='RandomFlip', prob=0.5), dict(type='PhotoMetricDistortion'),
        dict(type='PackSegInputs', meta_keys=meta_keys)]
source = dict(  # GTA5, labels in Cityscapes' train ids
    type='CityscapesDataset',
    data_root='data/gta/',
    data_prefix=dict(img_path='images', seg_map_path='labels'),
    img_suffix='.png',
    seg_map_suffix='_labelTrainIds.png',
    pipeline=[
        dict(type='LoadImageFromFile'),
        dict(type='LoadAnnotations'),
        dict(type='RandomResize', scale=(1914, 1052), ratio_range=(0.6, 2.0), keep_ratio=True),
        dict(type='RandomCrop', crop_size=_base_.crop_size, cat_max_ratio=0.75), *last])
target = dict(  # Cityscapes, without its labels
    type='CityscapesDataset',
    data_root='data/cityscapes/',
    data_prefix=dict(img_path='leftImg8bit/train'),
    pipeline=[
        dict(type='LoadImageFromFile'),
        dict(type='mmkd.Unlabelled'),
        dict(type='RandomResize', scale=(2048, 1024), ratio_range=(0.5, 2.0), keep_ratio=True),
        dict(type='RandomCrop', crop_size=_base_.crop_size), *last])
train_dataloader = dict(
    sampler=dict(_delete_=True, type='mmkd.DomainSampler'),
    dataset=dict(_delete_=True, type='ConcatDataset', datasets=[source, target]))
# the critics' learning rate, by the name of their entry
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'dakd.critics': dict(lr_mult=0.4, decay_mult=0)}))
auto_scale_lr = dict(enable=False, base_batch_size=8)
