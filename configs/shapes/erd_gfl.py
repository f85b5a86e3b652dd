# a model of three classes learns three more from images that are labelled for these alone
_base_ = 'gfl_student.py'
model = dict(
    _delete_=True,
    type='mmkd.Distill',
    student=_base_.model,
    class_names=_base_.metainfo['classes'],
    teacher=dict(
        config='mmkd::shapes/old_gfl_teacher.py',
        checkpoint='work_dirs/old_gfl_teacher/iter_1500.pth',
        classes=dict(circle='circle', square='square', ring='ring')),
    distillers=dict(erd=dict(type='ERD')),
    inherit=['backbone', 'neck', 'bbox_head'])
train_dataloader = dict(
    dataset=dict(pipeline=[
        dict(type='LoadImageFromFile'),
        dict(type='LoadAnnotations', with_bbox=True),
        dict(
            type='mmkd.LabelledFor', classes=('triangle', 'star', 'cross'), class_names=_base_.metainfo['classes']),
        dict(type='RandomFlip', prob=0.5),
        dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'labelled_for'))
    ]))
