"""Options with values that cannot be, and options that do not go together."""

import os
import tempfile
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import get_world_size

from mmkd.errors import ConfigError, nearest
from mmkd.hosts.configs import described_sources, numbered
from mmkd.hosts.datasets import datasets, type_name
from mmkd.registry import SOURCES, resolve
from mmkd.values import is_number, is_whole

ENDLESS = ('DomainSampler', 'InfiniteSampler')
MULTIPLIERS = ('lr_mult', 'decay_mult')


def check_options(config: Config) -> None:
    """Check what the Runner and mmkd take from a config for a training, as far as no model is needed.

    Raises:
        ConfigError: for the first option that cannot work.
    """
    check_parts(config, ('train', 'val'))
    _check_training(config)
    _check_optimizer(config)
    _check_schedulers(config)
    _check_counted_by_iteration(config)
    _check_runner(config)
    if 'student' in config.model or type_name(config.model) == 'Distill':
        _check_distillation(config)


def check_folder(path: str, option: str) -> None:
    """Check that a folder can be made and written to.

    Raises:
        ConfigError: naming what is in the way.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise ConfigError(f'{option}={path!r}: expected the name of a folder')
    there = os.path.abspath(os.path.expanduser(path))
    while not os.path.lexists(there):  # the nearest one of those around it
        there = os.path.dirname(there)
    if not os.path.isdir(there):
        raise ConfigError(f'{option} {path}: {there} is a file, not a folder; name another')
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ConfigError(
            f'{option} {path}: nothing can be written to {there} ({error.strerror}); name another'
        ) from None


def _whole(option: str, value: Any, least: int = 1) -> None:
    if not (is_whole(value) and value >= least):
        raise ConfigError(f'{option}={value!r}: expected a whole number of at least {least}')


def _count(option: str, value: Any, least: int) -> None:
    """As :func:`_whole`, for what may be written ``8e4`` as well."""
    _whole(option, int(value) if isinstance(value, float) and value.is_integer() else value, least)


def _part(config: Mapping, option: str) -> Mapping:
    value = config.get(option)
    if not isinstance(value, Mapping):
        raise ConfigError(f'{option}={value!r}: expected a dict' if option in config else f'the config has no {option}')
    return value


def check_parts(config: Config, parts: Sequence[str]) -> None:
    """Check that all is there that mmengine takes together for ``train``, ``val`` or ``test``, and the loaders.

    Raises:
        ConfigError: naming what is missing; a validation may be missing as a whole.
    """
    for part in parts:
        names = [f'{part}_cfg', f'{part}_dataloader', 'optim_wrapper' if part == 'train' else f'{part}_evaluator']
        missing = [name for name in names if config.get(name) is None]
        if missing and (part != 'val' or len(missing) < len(names)):
            raise ConfigError(f'{missing[0]}: missing; mmengine takes all of {", ".join(names)} or none')
        if not missing:
            _check_loader(config, part)


def _check_training(config: Config) -> None:
    training = _part(config, 'train_cfg')
    if not training.get('type') and 'by_epoch' not in training:
        raise ConfigError("train_cfg: it has no type, such as 'IterBasedTrainLoop' or 'EpochBasedTrainLoop'")
    sampler = _part(config, 'train_dataloader').get('sampler') or {}
    by_epoch = training.get('by_epoch', type_name(training) == 'EpochBasedTrainLoop')
    if by_epoch and type_name(sampler) in ENDLESS:
        raise ConfigError(
            f'train_dataloader.sampler: {type_name(sampler)} has no end, and train_cfg counts epochs, of which the first would '
            f"not end; train_cfg=dict(type='IterBasedTrainLoop', max_iters=..., val_interval=...)"
        )
    _check_turns(config)
    for option, least in (('max_iters', 1), ('max_epochs', 1), ('val_interval', 1), ('val_begin', 0)):
        if option in training:
            _count(f'train_cfg.{option}', training[option], least)


def _check_counted_by_iteration(config: Config) -> None:
    """Check that nothing waits for the end of an epoch, which a training that counts iterations has at its very end alone."""
    if config.train_cfg.get('by_epoch', type_name(config.train_cfg) != 'IterBasedTrainLoop'):
        return  # or nobody knows, of a loop of somebody's own
    found = config.get('param_scheduler') or []
    for index, each in enumerate([found] if isinstance(found, Mapping) else found):
        turns = isinstance(each, Mapping) and each.get('by_epoch', True) and not each.get('convert_to_iter_based')
        if turns and not str(type_name(each)).startswith('ReduceOnPlateau'):  # which looks at each evaluation
            raise ConfigError(
                f'param_scheduler[{index}]: {type_name(each)} counts epochs, and train_cfg iterations: it would never step; '
                f'by_epoch=False, and its numbers in iterations'
            )
    saved = (config.get('default_hooks') or {}).get('checkpoint')
    if isinstance(saved, Mapping) and saved.get('by_epoch', True):
        raise ConfigError(
            'default_hooks.checkpoint: it counts epochs, and train_cfg iterations: there would be no checkpoint before the end; '
            'default_hooks=dict(checkpoint=dict(by_epoch=False, interval=...))'
        )


def passes_apart(config: Config) -> bool:
    """Whether images without labels go through the student in a pass of their own: a detector's, and those that are labelled."""
    return config.get('default_scope') != 'mmseg' or (config.get('model') or {}).get('pseudo_labels') is not None


def _check_turns(config: Config) -> None:
    """Check that all processes have batches of one kind, where some images have no labels: they wait for each other.

    A detector's images without labels, and those that a teacher labels, pass it by themselves, and a process that has none of a
    kind would be a pass behind, and the sums over processes that are in its loss.
    """
    loader = _part(config, 'train_dataloader')
    parts = list(datasets(loader.get('dataset') or {}, 'train_dataloader.dataset'))
    marked = [any(type_name(step) == 'Unlabelled' for step in dataset.get('pipeline') or ()) for _, dataset in parts]
    if get_world_size() == 1 or not any(marked) or all(marked) or not passes_apart(config):
        return
    sampler = loader.get('sampler') or {}
    turn = sum(sampler.get('ratio') or [1] * len(parts))
    if type_name(sampler) != 'DomainSampler' or loader.get('batch_sampler') or loader.get('batch_size', 1) % turn:
        raise ConfigError(
            f'train_dataloader: images with and without labels on several processes: each batch has to have as many of both; '
            f"set sampler=dict(type='mmkd.DomainSampler'), batch_sampler=None and a batch_size that {turn} (the sum of its "
            f'ratio) divides'
        )


def _check_loader(config: Config, part: str) -> None:
    loader, option = _part(config, f'{part}_dataloader'), f'{part}_dataloader'
    for name in ('dataset', 'sampler'):
        if not loader.get(name) and not (name == 'sampler' and loader.get('batch_sampler')):
            raise ConfigError(f'{option}: it has no {name}')
    if not isinstance(loader['dataset'], Mapping):
        raise ConfigError(f'{option}.dataset={loader["dataset"]!r}: expected a dict')
    _whole(f'{option}.batch_size', loader.get('batch_size', 1))
    _whole(f'{option}.num_workers', loader.get('num_workers', 0), 0)
    if not loader.get('num_workers'):
        for name in ('persistent_workers', 'prefetch_factor', 'timeout'):
            if loader.get(name):
                raise ConfigError(
                    f'{option}.{name}={loader[name]!r} needs workers, and num_workers is 0; set {option}.{name}='
                    f'{"False" if name == "persistent_workers" else None}'
                )


def _check_optimizer(config: Config) -> None:
    wrapper = _part(config, 'optim_wrapper')
    optimizer = wrapper.get('optimizer')
    if optimizer is None and 'constructor' in wrapper:
        return
    if not isinstance(optimizer, Mapping):
        raise ConfigError(f'optim_wrapper.optimizer={optimizer!r}: expected a dict with type and lr')
    for name in ('lr', 'weight_decay', 'momentum', 'eps'):
        value = optimizer.get(name)
        if value is not None and not (is_number(value) and value >= 0):
            raise ConfigError(f'optim_wrapper.optimizer.{name}={value!r}: expected a number of at least 0')
    if 'accumulative_counts' in wrapper:
        _whole('optim_wrapper.accumulative_counts', wrapper['accumulative_counts'])
    clip = wrapper.get('clip_grad')
    if clip is not None and not isinstance(clip, Mapping):
        raise ConfigError(f'optim_wrapper.clip_grad={clip!r}: expected a dict such as dict(max_norm=35), or None')
    most = (clip or {}).get('max_norm')
    if most is not None and not (is_number(most) and most > 0):
        raise ConfigError(f'optim_wrapper.clip_grad.max_norm={most!r}: expected a positive number')
    keys = (wrapper.get('paramwise_cfg') or {}).get('custom_keys')
    for key, change in keys.items() if isinstance(keys, Mapping) else ():
        if not isinstance(change, Mapping):
            raise ConfigError(
                f'optim_wrapper.paramwise_cfg.custom_keys.{key}={change!r}: expected a dict such as dict(lr_mult=0.1)'
            )
        slip = next((name for name in change if name not in MULTIPLIERS and get_close_matches(name, MULTIPLIERS)), None)
        if slip:
            found = nearest(slip, MULTIPLIERS)
            raise ConfigError(
                f'optim_wrapper.paramwise_cfg.custom_keys.{key} has no entry {slip!r}; the nearest are {found}'
            )
        for name in MULTIPLIERS:
            if name in change and not (is_number(change[name]) and change[name] >= 0):
                raise ConfigError(
                    f'optim_wrapper.paramwise_cfg.custom_keys.{key}.{name}={change[name]!r}: expected a number of at least 0'
                )
    base = (config.get('auto_scale_lr') or {}).get('base_batch_size')
    if base is not None and not (is_number(base) and base > 0):  # a part of an image, where gradients are accumulated
        raise ConfigError(f'auto_scale_lr.base_batch_size={base!r}: expected a positive number')


def _check_schedulers(config: Config) -> None:
    found = config.get('param_scheduler')
    schedulers = (
        [('param_scheduler', found)] if isinstance(found, Mapping) else list(numbered('param_scheduler', found))
    )
    if found and not schedulers:
        raise ConfigError(f'param_scheduler={found!r}: expected a dict, or a list of them')
    for option, each in schedulers:
        if not isinstance(each, Mapping):
            raise ConfigError(f'{option}={each!r}: expected a dict with type')
        for name, least in (('begin', 0), ('end', 1), ('T_max', 1), ('step_size', 1)):
            if each.get(name) is not None:
                _count(f'{option}.{name}', each[name], least)
        if not isinstance(each.get('by_epoch', True), bool):
            raise ConfigError(f'{option}.by_epoch={each["by_epoch"]!r}: expected True or False')
        if each.get('end') is not None and each['end'] <= (each.get('begin') or 0):
            raise ConfigError(f'{option}.end={each["end"]}: expected more than begin, which is {each.get("begin", 0)}')
        steps = each.get('milestones')
        if steps is not None and not (_is_list(steps) and all(map(is_number, steps))):
            raise ConfigError(f'{option}.milestones={steps!r}: expected a list of numbers, such as [8, 11]')


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _check_runner(config: Config) -> None:
    seed = (config.get('randomness') or {}).get('seed')
    if seed is not None:
        _whole('randomness.seed', seed, 0)
    best = ((config.get('default_hooks') or {}).get('checkpoint') or {}).get('save_best')
    metrics = config.get('val_evaluator')
    if isinstance(metrics, Mapping) and type_name(metrics) == 'CocoMetric':
        begin = f'{metrics.get("prefix") or "coco"}/'
        wrong = [
            each for each in ([best] if isinstance(best, str) else best or ()) if each != 'auto' and begin not in each
        ]
        if wrong:
            raise ConfigError(
                f'default_hooks.checkpoint.save_best={best!r}: no score of CocoMetric is called {wrong[0]!r}; an example is '
                f'{begin + "bbox_mAP"!r}'
            )


def _check_distillation(config: Config) -> None:
    """The teachers' options and the distillers, which are built for it: most of their options need no model."""
    from mmkd.distillers.collection import Distillers  # all methods, seconds that `--help` need not take
    from mmkd.sources.teacher_labels import TeacherLabels

    labels = config.model.get('pseudo_labels')
    for name in ('student', 'teacher', 'distillers'):
        if not config.model.get(name) and not (name == 'distillers' and labels is not None):
            raise ConfigError(f'model.{name}: missing, or empty; a distilled model has student, teacher and distillers')
    for option, source in described_sources(config):
        if not isinstance(source, (str, Mapping)):
            raise ConfigError(f"{option}={source!r}: expected a config's name, or a dict with config and checkpoint")
        if isinstance(source, Mapping):
            resolve(SOURCES, option.removeprefix('model.'), {'type': 'Teacher', **source}, student=None)
    with torch.random.fork_rng([]):
        Distillers(config.model.get('distillers') or {}, optional=labels is not None)
    if labels is not None:
        TeacherLabels.read(labels)
        _check_unlabelled(config)


def _check_unlabelled(config: Config) -> None:
    """Raise ConfigError if there is no image that a teacher could label."""
    parts = datasets(_part(config, 'train_dataloader').get('dataset') or {}, 'train_dataloader.dataset')
    steps = [step for _, dataset in parts for step in dataset.get('pipeline') or () if isinstance(step, Mapping)]
    if not any(type_name(step) == 'Unlabelled' for step in steps):
        raise ConfigError(
            "model.pseudo_labels: no training image is without labels; put dict(type='mmkd.Unlabelled') in place of "
            'LoadAnnotations into the pipeline of those that a teacher is to label, or leave pseudo_labels out'
        )


def compare_batch_size(config: Config) -> list[str]:
    """Say so where the batch is not the one that the learning rate was chosen for."""
    scaling = config.get('auto_scale_lr') or {}
    base = scaling.get('base_batch_size')
    accumulated = config.optim_wrapper.get('accumulative_counts', 1)
    batch = config.train_dataloader.get('batch_size', 1) * get_world_size() * accumulated
    if not base or batch == base or scaling.get('enable'):
        return []
    return [
        f'The learning rate was chosen for a batch of {base} images and this run has {batch}: '
        f'add --auto-scale-lr to scale it by {batch / base:g}.'
    ]
