"""The student, or a plain model."""

from table import Accepted, Case


def student(name: str, options: str, expected, **more) -> Case:
    return Case(name, expected, f'model = dict(student=dict({options}))', **more)


def model(name: str, text: str, expected, **more) -> Case:
    return Case(name, expected, f'model = {text}', **more)


CASES = [
    student(
        'fewer classes than the data',
        'bbox_head=dict(num_classes=2)',
        r'bbox_head.num_classes=2: train_dataloader.dataset has 6 classes',
    ),
    student(
        'more classes than the data',
        'bbox_head=dict(num_classes=80)',
        r'bbox_head.num_classes=80: train_dataloader.dataset has 6',
    ),
    Case(
        'a plain model with other classes',
        r'model.bbox_head.num_classes=80: train_dataloader.dataset has 6',
        'model = dict(bbox_head=dict(num_classes=80))',
        base='plain.py',
    ),
    student(
        'a type with a typo',
        "type='RetinaNett'",
        r"model.student.type='RetinaNett': there is no such model in mmdet; .*'RetinaNet'",
    ),
    student(
        'a backbone with a typo',
        "backbone=dict(type='ResNte')",
        r"backbone.type='ResNte': there is no such model in mmdet; .*'ResNet'",
    ),
    student('a head with a typo', "bbox_head=dict(type='RetinaHeda')", r"bbox_head.type='RetinaHeda': .*'RetinaHead'"),
    student(
        'a loss with a typo',
        "bbox_head=dict(loss_cls=dict(type='FocalLos'))",
        r"loss_cls.type='FocalLos': .*'FocalLoss'",
    ),
    student(
        'an option with a typo', 'bbox_hed=dict()', r"model.student: RetinaNet has no option 'bbox_hed'; .*'bbox_head'"
    ),
    student(
        'an option of the backbone with a typo',
        'backbone=dict(dept=50)',
        r"model.student.backbone: ResNet has no option 'dept'; .*'depth'",
    ),
    student('an option of the neck with a typo', 'neck=dict(num_out=3)', r"FPN has no option 'num_out'; .*'num_outs'"),
    student(
        'an option of the loss with a typo',
        'bbox_head=dict(loss_cls=dict(gama=2.0))',
        r"FocalLoss has no option 'gama'; .*'gamma'",
    ),
    student(
        'a depth that does not exist',
        'backbone=dict(depth=19)',
        r'student: RetinaNet cannot be built; KeyError: invalid depth 19 for resnet',
    ),
    student(
        'a neck for other channels',
        'neck=dict(in_channels=[8, 16, 32, 128])',
        r'student: RetinaNet cannot be run as far as',
    ),
    student(
        'a neck with too few outputs', 'neck=dict(num_outs=1)', r'student: RetinaNet cannot be built; AssertionError'
    ),
    student(
        'a backbone without a type',
        'backbone=dict(_delete_=True, depth=18)',
        r'model.student.backbone: it names no class; give it a type',
    ),
    student('no backbone', "_delete_=True, type='RetinaNet'", r"student: RetinaNet cannot be built; .*'backbone'"),
    student(
        'a package that is not installed',
        "backbone=dict(_delete_=True, type='mmpretrain.ConvNeXt')",
        r"backbone.type='mmpretrain.ConvNeXt': package 'mmpretrain' is not installed",
    ),
    student(
        'pretrained weights that are not there',
        "backbone=dict(init_cfg=dict(type='Pretrained', checkpoint='r18.pth'))",
        r'model.student.backbone.init_cfg r18.pth: no such file .*; put it there, or start without',
    ),
    student(
        'pretrained weights that no table knows',
        "backbone=dict(init_cfg=dict(type='Pretrained', checkpoint='open-mmlab://resnet18_v1x'))",
        r"init_cfg open-mmlab://resnet18_v1x: mmengine knows no such model; .*'resnet18_v1c'",
    ),
    student(
        'pretrained weights of another address',
        "init_cfg=dict(type='Pretrained', checkpoint='torchvison://resnet18')",
        r'torchvison:/+resnet18: no such file',
    ),
    model(
        'student is missing',
        "dict(_delete_=True, type='mmkd.Distill', teacher='mmdet::x', distillers=dict(a=dict(type='AT', layer='neck')))",
        r'model.student: missing, or empty; a distilled model has student',
    ),
    model('student is None', 'dict(student=None)', r'model.student: missing, or empty'),
    model('student is a number', 'dict(student=50)', r'model.student.*: expected a model.s config, found 50'),
    model('student is a list', "dict(student=[dict(type='RetinaNet')])", r'model.student.*: expected a model.s config'),
    model('student is the name of no config', "dict(student='retinanet_r50')", r'student retinanet_r50: no such file'),
    model(
        'student is a name of mmdet with a typo',
        "dict(student='mmdet::retinanet/retinanet_r50_fpn_1x.py')",
        r'mmdet has no such config',
    ),
    model(
        'student is a config without a model',
        "dict(student='empty.py')",
        r'model.* of .*empty.py: expected a model',
        files=lambda folder: (folder / 'empty.py').write_text('a = 1\n'),
    ),
    model(
        'distilled with a typo',
        "dict(type='mmkd.Distil')",
        r"model.type='mmkd.Distil': there is no such model.*; the nearest are 'mmkd.Distill'",
    ),
    model(
        'distilled without its package',
        "dict(type='Distill')",
        r"model.type='Distill': there is no such model in mmdet",
    ),
    model(
        'distilled with a new key',
        'dict(students=dict())',
        r"model: distill has no option 'students'; the nearest are 'student'",
    ),
    model(
        'teachers for teacher',
        "dict(teachers='x')",
        r"model: distill has no option 'teachers'; the nearest are 'teacher'",
    ),
    model(
        'the plain model beside the student',
        "dict(backbone=dict(type='ResNet', depth=18))",
        r"model: distill has no option 'backbone'",
    ),
    student('a student that is its own teacher', 'bbox_head=dict(num_classes=6)', Accepted('the config is as it was')),
    model(
        "the student's own config as a path",
        "dict(student='student.py')",
        Accepted('a config may be named'),
        files=lambda folder: (folder / 'student.py').write_text("_base_ = 'plain.py'\n"),
    ),
]
