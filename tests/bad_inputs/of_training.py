"""Loaders, loops, optimizers, schedulers, hooks, work directories, and what a training begins with."""

from pathlib import Path

import torch
from table import Accepted, Case


def loader(name: str, options: str, expected, **more) -> Case:
    return Case(name, expected, f'train_dataloader = dict({options})', **more)


def loop(name: str, options: str, expected) -> Case:
    return Case(name, expected, f'train_cfg = dict({options})')


def optim(name: str, options: str, expected) -> Case:
    return Case(name, expected, f'optim_wrapper = dict({options})')


def optimizer(name: str, options: str, expected) -> Case:
    return optim(name, f'optimizer=dict({options})', expected)


def scheduler(name: str, value: str, expected) -> Case:
    return Case(name, expected, f'param_scheduler = {value}')


def folder(name: str, path: str, expected, **more) -> Case:
    return Case(name, expected, options=('--work-dir', path), **more)


def start(name: str, expected, write=None, **more) -> Case:
    """A checkpoint that ``load_from`` names."""
    return Case(name, expected, "load_from = 'start.pth'", files=write, **more)


def saved(content):
    def write(place: Path) -> None:
        torch.save(content, place / 'start.pth')

    return write


CASES = [
    loader('a batch of 0', 'batch_size=0', r'train_dataloader.batch_size=0: expected a whole number of at least 1'),
    loader('a negative batch', 'batch_size=-4', r'train_dataloader.batch_size=-4: expected'),
    loader('a batch that is a string', "batch_size='4'", r"train_dataloader.batch_size='4': expected a whole number"),
    loader('a batch of a half', 'batch_size=2.5', r'train_dataloader.batch_size=2.5: expected a whole number'),
    loader(
        'negative workers', 'num_workers=-1', r'train_dataloader.num_workers=-1: expected a whole number of at least 0'
    ),
    loader(
        'persistent workers, of which there are none',
        'persistent_workers=True',
        r'persistent_workers=True needs workers, .*persistent_workers=False',
    ),
    loader(
        'prefetching without workers', 'prefetch_factor=2', r'prefetch_factor=2 needs workers, and num_workers is 0'
    ),
    loader(
        'an option with a typo',
        'num_worker=2',
        r"train_dataloader has no entry 'num_worker'; .*'num_workers'",
    ),
    loader('no sampler', 'sampler=None', r'train_dataloader: it has no sampler'),
    loader(
        'a sampler with a typo',
        "sampler=dict(type='InfinitSampler')",
        r"sampler.type='InfinitSampler': .*'InfiniteSampler'",
    ),
    loader(
        "a sampler's option with a typo",
        'sampler=dict(shufle=True)',
        r"InfiniteSampler has no option 'shufle'; .*'shuffle'",
    ),
    loader('no data set', 'dataset=None', r'train_dataloader: it has no dataset'),
    loader('a data set by its name', "dataset='coco'", r"train_dataloader.dataset='coco': expected a dict"),
    loader(
        'a data set with a typo',
        "dataset=dict(type='CocoDatset')",
        r"dataset.type='CocoDatset': there is no such dataset in mmdet; .*'CocoDataset'",
    ),
    loader(
        "a data set's option with a typo",
        "dataset=dict(anno_file='x')",
        r"CocoDataset has no option 'anno_file'; .*'ann_file'",
    ),
    loader(
        'a transform with a typo',
        "dataset=dict(pipeline=[dict(type='LoadImageFromFiles')])",
        r"pipeline.0.type='LoadImageFromFiles': .*'LoadImageFromFile'",
    ),
    loader(
        "a transform's option with a typo",
        "dataset=dict(pipeline=[dict(type='RandomFlip', probability=0.5)])",
        r"pipeline.0: RandomFlip has no option 'probability'; .*'prob'",
    ),
    loader('a transform without a type', 'dataset=dict(pipeline=[dict(prob=0.5)])', r'pipeline.0: it names no class'),
    loader('an empty pipeline', 'dataset=dict(pipeline=[])', r'.*pipeline'),
    Case('no training data', r'train_dataloader: missing; mmengine takes all of', 'train_dataloader = None'),
    Case('no loop', r'train_cfg: missing; mmengine takes all of', 'train_cfg = None'),
    Case('no optimizer', r'optim_wrapper: missing; mmengine takes all of', 'optim_wrapper = None'),
    Case('no evaluator', r'val_evaluator: missing; mmengine takes all of', 'val_evaluator = None'),
    Case('no loop for the validation', r'val_cfg: missing; mmengine takes all of', 'val_cfg = None'),
    Case(
        'an evaluator with a typo',
        r"val_evaluator.type='CocoMetrics': .*'CocoMetric'",
        "val_evaluator = dict(type='CocoMetrics')",
    ),
    Case(
        "an evaluator's option with a typo",
        r"CocoMetric has no option 'metrc'; .*'metric'",
        "val_evaluator = dict(metrc='bbox')",
    ),
    Case(
        'an evaluator of the other task',
        r"val_evaluator.type='IoUMetric': there is no such metric in mmdet",
        "val_evaluator = dict(_delete_=True, type='IoUMetric')",
    ),
    loop(
        'a type with a typo', "type='IterBasedTrainLop'", r"train_cfg.type='IterBasedTrainLop': .*'IterBasedTrainLoop'"
    ),
    loop('no type', '_delete_=True, max_iters=4', r'train_cfg: it has no type'),
    loop('0 iterations', 'max_iters=0', r'train_cfg.max_iters=0: expected a whole number of at least 1'),
    loop('negative iterations', 'max_iters=-1', r'train_cfg.max_iters=-1: expected'),
    loop('iterations that are a string', "max_iters='4'", r"train_cfg.max_iters='4': expected a whole number"),
    loop('half an iteration', 'max_iters=4.5', r'train_cfg.max_iters=4.5: expected a whole number'),
    loop('epochs in a loop of iterations', 'max_epochs=12', r"IterBasedTrainLoop has no option 'max_epochs'"),
    loop(
        'a validation every 0 iterations',
        'val_interval=0',
        r'train_cfg.val_interval=0: expected a whole number of at least 1',
    ),
    optimizer(
        'a learning rate that is a string',
        "lr='1e-3'",
        r"optim_wrapper.optimizer.lr='1e-3': expected a number of at least 0",
    ),
    optimizer(
        'a negative learning rate', 'lr=-0.1', r'optim_wrapper.optimizer.lr=-0.1: expected a number of at least 0'
    ),
    optimizer('a learning rate of NaN', "lr=float('nan')", r'optim_wrapper.optimizer.lr=nan: expected'),
    optimizer('a decay that is a string', "weight_decay='1e-4'", r"weight_decay='1e-4': expected a number"),
    optimizer(
        'a type with a typo', "type='SDG'", r"optim_wrapper.optimizer.type='SDG': there is no such optimizer.*'SGD'"
    ),
    optimizer('an option of another optimizer', "type='AdamW'", r"AdamW has no option 'momentum'"),
    optimizer('no type', '_delete_=True, lr=0.1', r'optim_wrapper.optimizer.*type'),
    optim(
        'an optimizer by its name',
        "optimizer='SGD'",
        r"optim_wrapper.optimizer='SGD': expected a dict with type and lr",
    ),
    optim('no optimizer in it', "_delete_=True, type='OptimWrapper'", r'optim_wrapper.optimizer=None: expected a dict'),
    optim('a wrapper with a typo', "type='OptimWraper'", r"optim_wrapper.type='OptimWraper': .*'OptimWrapper'"),
    optim('clipping by a number', 'clip_grad=10', r'optim_wrapper.clip_grad=10: expected a dict such as'),
    optim(
        'clipping at 0', 'clip_grad=dict(max_norm=0)', r'optim_wrapper.clip_grad.max_norm=0: expected a positive number'
    ),
    optim(
        'accumulating 0 steps', 'accumulative_counts=0', r'accumulative_counts=0: expected a whole number of at least 1'
    ),
    optim(
        'a rule that is a number',
        'paramwise_cfg=dict(custom_keys=dict(backbone=0.1))',
        r'custom_keys.backbone=0.1: expected a dict such as',
    ),
    optim(
        'a negative rule',
        'paramwise_cfg=dict(custom_keys=dict(backbone=dict(lr_mult=-1)))',
        r'custom_keys.backbone.lr_mult=-1: expected',
    ),
    optim(
        'a rule with a typo',
        'paramwise_cfg=dict(custom_keys=dict(backbone=dict(lr_mul=0.1)))',
        r"custom_keys.backbone.*'lr_mul'.*'lr_mult'",
    ),
    scheduler('a string', "'cosine'", r"param_scheduler='cosine': expected a dict, or a list of them"),
    scheduler('a list of strings', "['cosine']", r"param_scheduler.0='cosine': expected a dict with type"),
    scheduler(
        'a type with a typo',
        "[dict(type='LinerLR', start_factor=0.1)]",
        r"param_scheduler.0.type='LinerLR': .*'LinearLR'",
    ),
    scheduler(
        'an option with a typo',
        "[dict(type='LinearLR', start_fator=0.1)]",
        r"has no option 'start_fator'; .*'start_factor'",
    ),
    scheduler(
        'an end before the begin',
        "[dict(type='LinearLR', start_factor=0.1, begin=5, end=2)]",
        r'param_scheduler.0.end=2: expected more than begin, which is 5',
    ),
    scheduler(
        'an end that is a string',
        "[dict(type='LinearLR', start_factor=0.1, end='2')]",
        r"param_scheduler.0.end='2': expected a whole number",
    ),
    scheduler(
        'milestones that are a number',
        "[dict(type='MultiStepLR', milestones=8)]",
        r'param_scheduler.0.milestones=8: expected a list of numbers',
    ),
    scheduler(
        'milestones that are strings',
        "[dict(type='MultiStepLR', milestones=['8'])]",
        r"milestones=\['8'\]: expected a list of numbers",
    ),
    Case('hooks as a list', r'default_hooks=\[.*\]: expected a dict', "default_hooks = [dict(type='LoggerHook')]"),
    Case(
        'a hook with a typo',
        r"default_hooks.logger.type='LogerHook': .*'LoggerHook'",
        "default_hooks = dict(logger=dict(type='LogerHook'))",
    ),
    Case(
        'a hook without a type', r'default_hooks.ema: it names no class', 'default_hooks = dict(ema=dict(momentum=0.1))'
    ),
    Case(
        "a hook of one's own with a typo",
        r"custom_hooks.0.type='EMAHok': .*'EMAHook'",
        "custom_hooks = [dict(type='EMAHok')]",
    ),
    Case('own hooks as a dict', r'custom_hooks=.*: expected a list', "custom_hooks = dict(type='EMAHook')"),
    Case(
        'an option of a hook with a typo',
        r"LoggerHook has no option 'intervl'; .*'interval'",
        'default_hooks = dict(logger=dict(intervl=5))',
    ),
    Case(
        'a best score by half its name',
        r"save_best='bbox_mAP': no score of CocoMetric is called 'bbox_mAP'; an example is 'coco/bbox_mAP'",
        "default_hooks = dict(checkpoint=dict(save_best='bbox_mAP'))",
    ),
    Case('a seed that is a string', r"randomness.seed='0': expected a whole number", "randomness = dict(seed='0')"),
    Case(
        'schedulers of epochs in a training of iterations',
        r'param_scheduler\[0\]: MultiStepLR counts epochs, and train_cfg iterations',
        "param_scheduler = [dict(type='MultiStepLR', milestones=[1])]",
    ),
    Case(
        'checkpoints of epochs in a training of iterations',
        r'default_hooks.checkpoint: it counts epochs, and train_cfg iterations',
        'default_hooks = dict(checkpoint=dict(by_epoch=True))',
    ),
    Case('a base batch of 0', r'auto_scale_lr.base_batch_size=0: expected', 'auto_scale_lr = dict(base_batch_size=0)'),
    Case(
        'a visualizer with a typo',
        r"visualizer.type='DetLocalVisualiser': .*'DetLocalVisualizer'",
        "visualizer = dict(type='DetLocalVisualiser')",
    ),
    folder('a work directory that is a file', 'base.py', r'--work-dir base.py: .*base.py is a file, not a folder'),
    folder('a work directory below a file', 'base.py/x', r'--work-dir base.py/x: .*base.py is a file'),
    folder('a work directory that cannot be made', '/proc/x', r'--work-dir /proc/x: nothing can be written to /proc'),
    Case('a work directory that is a number', r'work_dir=5: expected a string', 'work_dir = 5'),
    start('load_from: not there', r'load_from start.pth: no such file'),
    start('load_from: empty', r'load_from start.pth: ', lambda place: (place / 'start.pth').write_bytes(b'')),
    start(
        'load_from: a web page',
        r'load_from start.pth: is no checkpoint of PyTorch, or damaged',
        lambda place: (place / 'start.pth').write_bytes(b'<html>'),
    ),
    start(
        'load_from: nothing of this model',
        r'load_from start.pth: fits nothing of DistilledRetinaNet',
        saved({'a.b': torch.zeros(2)}),
    ),
    start('load_from: no weights', r'load_from start.pth: holds no weights', saved({'epoch': 3})),
    Case('load_from: a number', r'load_from=3|load_from 3', 'load_from = 3'),
    Case(
        '--resume: not there',
        r'--resume nothere.pth: no such file',
        options=('--resume', 'nothere.pth'),
    ),
    # what is right
    Case(
        'a best score',
        Accepted('as CocoMetric calls it'),
        "default_hooks = dict(checkpoint=dict(save_best='coco/bbox_mAP'))",
    ),
    Case(
        'a single image, where no norm sees one value',
        Accepted('RetinaNet has no map of 1x1'),
        'train_dataloader = dict(batch_size=1)',
    ),
    Case(
        'a single image, where a pooled map is 1x1',
        r'train_dataloader.batch_size=1: decode_head\S+ is a batch norm over a single value of each channel',
        'train_dataloader = dict(batch_size=1)',
        base='masks.py',
    ),
    loader('a batch larger than the data set', 'batch_size=16', Accepted('the sampler goes around')),
    loop('iterations as 4e0', 'max_iters=4e0', Accepted('mmengine takes whole floats')),
    scheduler('none', 'None', Accepted('a constant learning rate')),
    optimizer('a learning rate of 0', 'lr=0.0', Accepted('as for a trial of the data')),
    Case(
        'no validation',
        Accepted('mmengine trains without'),
        'val_cfg = None\nval_dataloader = None\nval_evaluator = None',
    ),
    Case('the default hooks set off', Accepted('mmengine takes None for it'), 'default_hooks = dict(checkpoint=None)'),
    folder('a work directory that is not there', 'a/b/c', Accepted('it is made')),
    start(
        'load_from: a part of the weights',
        Accepted('as for a backbone'),
        lambda place: torch.save(
            {
                name: value
                for name, value in torch.load(place / 'student.pth', weights_only=True)['state_dict'].items()
                if name.startswith('backbone')
            },
            place / 'start.pth',
        ),
    ),
]
