"""Training configs for tests: generated data, small models, mmengine's real Runner."""

import json
import math
import os
import time
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.runner import Runner

from mmkd.data import shapes, streets
from mmkd.testing import detectors, models, segmentors


def shapes_config(folder: str | Path, model: dict, iterations: int = 4, batch: int = 4, images: int = 24) -> Config:
    """A config to train ``model`` on freshly generated shapes.

    Args:
        folder: For the data set and the work directory.
        model: The model's config, plain or distilled.
        iterations: Length of the training, with one checkpoint at its end.
        batch: Images per process and iteration.
        images: In the training set; the validation set has 8.
    """
    folder = Path(folder)
    root = shapes.generate(folder / 'shapes', size=96, splits={'train': images, 'val': 8})
    metainfo = dict(classes=shapes.CLASSES)
    load = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True)]

    def loader(split: str, size: int, **options) -> dict:
        extra = [dict(type='RandomFlip', prob=0.5)] if split == 'train' else [dict(type='Resize', scale=(96, 96))]
        return dict(
            batch_size=size,
            num_workers=0,
            dataset=dict(
                type='CocoDataset',
                data_root=str(root),
                metainfo=metainfo,
                ann_file=f'annotations/{split}.json',
                data_prefix=dict(img=f'{split}/'),
                test_mode=split == 'val',
                pipeline=[*load, *extra, dict(type='PackDetInputs')],
            ),
            **options,
        )

    validation = loader('val', 4, sampler=dict(type='DefaultSampler', shuffle=False))
    return _training(
        folder,
        model,
        loader('train', batch, sampler=dict(type='InfiniteSampler', shuffle=True)),
        validation,
        dict(type='CocoMetric', ann_file=str(root / 'annotations/val.json'), metric='bbox'),
        iterations,
        default_scope='mmdet',
        default_hooks=dict(visualization=dict(type='DetVisualizationHook')),
        visualizer=dict(type='DetLocalVisualizer', name='visualizer', vis_backends=[dict(type='LocalVisBackend')]),
    )


def streets_config(
    folder: str | Path, model: dict, iterations: int = 4, batch: int = 4, images: int = 24, two_domains: bool = False
) -> Config:
    """A config to train ``model`` on freshly generated streets.

    Args:
        folder: For the data set and the work directory.
        model: The model's config, plain or distilled.
        iterations: Length of the training, with one checkpoint at its end.
        batch: Images per process and iteration.
        images: In the training set; the validation set has 8.
        two_domains: Whether every other image is one of an unlabelled domain.
    """
    folder = Path(folder)
    root = streets.generate(folder / 'streets', {'train': images, 'val': 8}, size=(64, 128))

    def data(split: str, labels: str = 'LoadAnnotations') -> dict:
        flip = [dict(type='RandomFlip', prob=0.5)] if split == 'train' else []
        pack = dict(type='PackSegInputs', meta_keys=('img_path', 'ori_shape', 'img_shape', 'domain'))
        return dict(
            type='CityscapesDataset',
            data_root=str(root),
            data_prefix=dict(img_path=f'leftImg8bit/{split}', seg_map_path=f'gtFine/{split}'),
            pipeline=[dict(type='LoadImageFromFile'), dict(type=labels), *flip, pack],
        )

    sampler, dataset = dict(type='InfiniteSampler', shuffle=True), data('train')
    if two_domains:
        sampler = dict(type='mmkd.DomainSampler')
        dataset = dict(type='ConcatDataset', datasets=[dataset, data('train', 'mmkd.Unlabelled')])
    return _training(
        folder,
        model,
        dict(batch_size=batch, num_workers=0, sampler=sampler, dataset=dataset),
        dict(batch_size=1, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False), dataset=data('val')),
        dict(type='IoUMetric', iou_metrics=['mIoU']),
        iterations,
        default_scope='mmseg',
    )


def _training(
    folder: Path, model: dict, train: dict, validation: dict, metric: dict, iterations: int, **changes: Any
) -> Config:
    """A config of mmengine's Runner; ``changes`` are merged into it."""
    config = Config(
        dict(
            model=model,
            train_dataloader=train,
            val_dataloader=validation,
            test_dataloader=validation,
            val_evaluator=metric,
            test_evaluator=metric,
            train_cfg=dict(type='IterBasedTrainLoop', max_iters=iterations, val_interval=10**6),
            val_cfg=dict(type='ValLoop'),
            test_cfg=dict(type='TestLoop'),
            optim_wrapper=dict(
                type='OptimWrapper',
                optimizer=dict(type='SGD', lr=0.01, momentum=0.9, weight_decay=1e-4),
                clip_grad=dict(max_norm=10),
            ),
            param_scheduler=[dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=iterations)],
            default_hooks=dict(
                logger=dict(type='LoggerHook', interval=1),
                checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=iterations),
            ),
            log_processor=dict(type='LogProcessor', by_epoch=False, window_size=1),
            auto_scale_lr=dict(enable=False, base_batch_size=train['batch_size']),
            randomness=dict(seed=0),
            env_cfg=dict(dist_cfg=dict(backend='nccl')),
            work_dir=str(folder / 'work'),
            experiment_name=folder.name,
        )
    )
    config.merge_from_dict(changes)
    return config


def distilled(folder: str | Path, distillers: dict, student: dict | None = None, teacher: dict | None = None) -> dict:
    """The config of a distilled RetinaNet with six classes, whose teacher's weights are written to ``folder``."""
    student = student or detectors.retinanet(classes=6)
    teacher = teacher or detectors.retinanet(classes=6, channels=24, base=12)
    checkpoint = models.save_weights(teacher, Path(folder) / 'teacher.pth')
    return dict(
        type='mmkd.Distill', student=student, teacher=dict(config=teacher, checkpoint=checkpoint), distillers=distillers
    )


def of_all_sources(folder: str | Path, family: str) -> dict:
    """The config of a ``'RetinaNet'`` or ``'PSPNet'`` that learns from all kinds of sources at once, one of them now and then.

    Without dropout, so that tests of mmengine's own Runner can compare a resumed training.
    """
    student: dict[str, Any]
    wide: dict[str, Any]
    if family == 'RetinaNet':
        student, wide = detectors.retinanet(classes=6), detectors.retinanet(classes=6, channels=24, base=12)
        entry, own = dict(type='AT', layer='neck'), dict(layer='backbone.layer3', teacher_layer='backbone.layer4')
    else:
        student, wide = segmentors.pspnet(), segmentors.pspnet(24)
        entry = dict(type='KD')
        own = dict(layer='auxiliary_head.conv_seg', teacher_layer='decode_head.conv_seg')
        for config in (student, wide):
            for head in ('decode_head', 'auxiliary_head'):
                config[head]['dropout_ratio'] = 0.0
    return dict(
        type='mmkd.Distill',
        student=student,
        teacher=dict(
            large=dict(config=wide, checkpoint=models.save_weights(wide, Path(folder) / 'teacher.pth')),
            mean=dict(type='Average', momentum=0.9, begin=1),
            peer=dict(type='Peer', config=wide, interval=2),
            own=dict(type='Own'),
        ),
        distillers=dict(
            frozen=dict(entry, teacher='large'),
            temporal=dict(entry, teacher='mean'),
            down=dict(entry, teacher='peer'),
            up=dict(entry, teacher='own', learner='peer'),
            deeper=dict(entry, teacher='own', **own),
        ),
    )


def two_steps(config: Config, folder: str | Path) -> tuple[BaseModel, list[dict]]:
    """Train a distilled config for two steps, with random weights in both networks; the model, and what each step logged."""
    loader = config.train_dataloader
    loader.update(batch_size=2, num_workers=0, persistent_workers=False, batch_sampler=None)
    if loader.sampler.type != 'mmkd.DomainSampler':
        loader.sampler = dict(type='DefaultSampler', shuffle=False)
    student = config.model.student
    student.backbone.init_cfg = None
    if 'pretrained' in student:  # mmseg
        student.pretrained = None
    config.train_cfg = dict(type='IterBasedTrainLoop', max_iters=2)
    config.param_scheduler = []
    for part in ('val', 'test'):
        config[f'{part}_cfg'] = config[f'{part}_dataloader'] = config[f'{part}_evaluator'] = None
    config.default_hooks.checkpoint = None
    config.default_hooks.logger.interval = 1
    config.log_processor = dict(type='LogProcessor', by_epoch=False, window_size=1)
    config.work_dir = str(folder)
    config.experiment_name = config.visualizer.name = Path(folder).name  # mmengine keeps both by name
    runner = Runner.from_cfg(config)
    for source in runner.model.sources.values():
        if source.frozen:
            source.accept_current_weights()  # random ones
    runner.train()
    (scalars,) = Path(folder).glob('*/vis_data/scalars.json')
    return runner.model, [json.loads(line) for line in scalars.read_text().splitlines()]


def check_steps(steps: list[dict], config: Config) -> None:
    """Two steps were logged, every value of which is finite, with a loss of each method."""
    assert len(steps) == 2
    for step in steps:
        assert all(math.isfinite(value) for value in step.values() if isinstance(value, float)), step
        for method in config.model.distillers:
            assert any(key.startswith(f'{method}.loss') for key in step), (method, step)


class SaveEachRank(Hook):
    """Write the weights of each process to the work directory: ``rank<number>.pth`` and, before, ``rank<number>_before.pth``."""

    def before_train(self, runner: Runner) -> None:
        self._save(runner, '_before')

    def after_train(self, runner: Runner) -> None:
        self._save(runner, '')

    def _save(self, runner: Runner, when: str) -> None:
        model = getattr(runner.model, 'module', runner.model)
        torch.save(model.state_dict(), Path(runner.work_dir) / f'rank{runner.rank}{when}.pth')


class PauseAt(Hook):
    """Hold the training after an iteration until the work directory has a file ``go_on``, at most for two minutes.

    A process that is held says so by a file ``paused<rank>``, which has its process id.

    Args:
        iteration: The first is 1.
    """

    def __init__(self, iteration: int):
        self.iteration = iteration

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None, outputs: dict | None = None
    ) -> None:
        folder = Path(runner.work_dir)
        if runner.iter + 1 != self.iteration or (folder / 'go_on').exists():
            return
        name = folder / f'paused{runner.rank}'
        name.with_suffix('.new').write_text(str(os.getpid()))
        name.with_suffix('.new').rename(name)
        for _ in range(1200):
            if (folder / 'go_on').exists():
                return
            time.sleep(0.1)
        raise TimeoutError(f'{folder / "go_on"}: nobody wrote it')
