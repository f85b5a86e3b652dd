"""Whether the files of data loaders and evaluators are there, and can be what the config takes them for."""

import os
from collections.abc import Iterator, Mapping, Sequence

from mmengine.config import Config

from mmkd.checks.coco import check_coco, compare_evaluator
from mmkd.checks.label_maps import check_label_maps, check_segmentation_classes
from mmkd.errors import ConfigError
from mmkd.hosts.configs import described_sources, numbered
from mmkd.hosts.datasets import annotation_path, datasets, is_coco, is_segmentation, local, type_name

WHICH = {'train': 'train_dataloader.dataset', 'val': 'val_dataloader.dataset', 'test': 'test_dataloader.dataset'}
TRY = 'to try mmkd without any download: make demo, make demo-seg'


def check_data(config: Config, parts: Sequence[str]) -> list[str]:
    """Check the files of the data loaders and evaluators of ``train``, ``val`` or ``test``.

    Returns:
        Warnings for the log, a line each.

    Raises:
        ConfigError: naming the option, the path, and how to point to another.
    """
    warnings = []
    scope = config.get('default_scope')
    for part in parts:
        found = list(part_datasets(config, part))
        for option, dataset in found:
            _check_marks(option, dataset)
            warnings += _check_dataset(option, dataset, scope, part == 'train')
        if part == 'train':
            _check_views(config)
        for option, metric in _metrics(config, part):
            path = metric.get('ann_file')
            if not path or not local(metric):
                continue
            if not os.path.exists(path):
                raise ConfigError(
                    f'{option}.ann_file: {os.path.abspath(path)} does not exist; {elsewhere(option, "ann_file", path)}'
                )
            if type_name(metric) == 'CocoMetric' and len(found) == 1 and is_coco(found[0][1], scope):
                if local(found[0][1]):
                    warnings += compare_evaluator(option, path, found[0][1])
    return list(dict.fromkeys(warnings))


def elsewhere(option: str, key: str, default: str) -> str:
    """What to do about data that are not where the config has them."""
    return (
        f'put or link the data there (ln -s /path/to/data {default.rstrip("/")}), or name another place in a config of your own '
        f'or with --cfg-options {option}.{key}=/path/to/data/ (train, val, test and the evaluators have their own); {TRY}'
    )


def part_datasets(config: Config, part: str) -> Iterator[tuple[str, Mapping]]:
    """The data sets of ``train``, ``val`` or ``test``, each with its option's name."""
    loader = config.get(f'{part}_dataloader')
    return datasets(loader.dataset, WHICH[part]) if loader else iter(())


def _metrics(config: Config, part: str) -> Iterator[tuple[str, Mapping]]:
    option = f'{part}_evaluator'
    found = config.get(option)
    for name, each in [(option, found), *numbered(option, found)]:
        if isinstance(each, Mapping):
            yield name, each


MARKS = {'Unlabelled': 'domain', 'LabelledFor': 'labelled_for'}
"""Transforms that mark an image, and the meta data that has the mark."""
VIEWS = {'KeepView': 'weak', 'LoadView': None}
"""Transforms that give an image another one, and its name where they are given none."""
MOVING = (
    'CachedMixUp CachedMosaic CenterCrop CopyPaste Expand MinIoURandomCrop MixUp Mosaic Pad RandomAffine RandomCenterCropPad '
    'RandomChoiceResize RandomCrop RandomFlip RandomMosaic RandomResize RandomRotate RandomRotFlip RandomShift Resize '
    'ResizeShortestEdge ResizeToMultiple Rotate ShearX ShearY TranslateX TranslateY YOLOXMixUp'
).split()
"""Transforms of mmcv, mmdet and mmseg that move pixels."""


def _steps(dataset: Mapping) -> list[tuple[str, Mapping]]:
    return [(type_name(step), step) for step in dataset.get('pipeline') or () if isinstance(step, Mapping)]


def _check_marks(option: str, dataset: Mapping) -> None:
    """Raise ConfigError if images without labels would reach the student as images without objects, or views no teacher."""
    steps = _steps(dataset)
    packs = [(name, step) for name, step in steps if name.startswith('Pack')]
    given = [(name, 'marks images as such', MARKS[name]) for name, _ in steps if name in MARKS]
    given += [(name, 'adds an image', step.get('view', VIEWS[name])) for name, step in steps if name in VIEWS]
    for mark, does, key in given:
        name, step = packs[-1] if packs else ('the pipeline around it', {})
        if key not in (step.get('meta_keys') or ()):
            raise ConfigError(
                f'{option}.pipeline: mmkd.{mark} {does} in their meta data, which {name} leaves out; write '
                f"dict(type='{name}', meta_keys=(..., '{key}')) with those that it has"
            )


def _check_views(config: Config) -> None:
    """Raise ConfigError if a teacher would not find its view of a training image, or one that other transforms have moved."""
    wanted = [(source, spec['view']) for source, spec in described_sources(config) if _has_view(spec)]
    for option, dataset in part_datasets(config, 'train') if wanted else ():
        steps = _steps(dataset)
        if not any(name.startswith('Pack') for name, _ in steps):
            continue  # of a wrapper, which has a pipeline of its own
        for source, view in wanted:
            own = [
                at for at, (name, step) in enumerate(steps) if name in VIEWS and step.get('view', VIEWS[name]) == view
            ]
            if not own:
                raise ConfigError(
                    f'{option}.pipeline: {source} sees the view {view!r}, which it does not give; put '
                    f"dict(type='mmkd.KeepView', view={view!r}) behind what moves pixels"
                )
            moved = next((name for _, step in steps[own[-1] + 1 :] for name in _moving(step)), None)
            if moved is not None:
                raise ConfigError(
                    f'{option}.pipeline: {moved} behind the view {view!r} would move the pixels of the image alone; put it '
                    f"before KeepView, or into dict(type='mmkd.Both', view={view!r}, transforms=[...])"
                )


def _has_view(spec: object) -> bool:
    return isinstance(spec, Mapping) and spec.get('view') is not None


def _moving(step: object) -> Iterator[str]:
    """What moves pixels in a step and those inside of it, other than those of ``mmkd.Both``."""
    if isinstance(step, Mapping):
        name = type_name(step)
        if name in MOVING:
            yield name
        inner: Sequence = () if name == 'Both' else list(step.values())
    else:
        inner = step if isinstance(step, (list, tuple)) else ()
    for each in inner:
        yield from _moving(each)


def _check_dataset(option: str, dataset: Mapping, scope: str | None, trains: bool) -> list[str]:
    if not local(dataset):
        return []
    coco, segmentation = is_coco(dataset, scope), is_segmentation(dataset, scope)
    if coco and not dataset.get('ann_file'):
        raise ConfigError(
            f"{option}.ann_file: missing; {type_name(dataset)} reads its annotations from it, such as ann_file='annotations/"
            f"train.json', below data_root"
        )
    root = dataset.get('data_root') or ''
    prefixes = dataset.get('data_prefix') or {}
    folders = {f'data_prefix.{key}': prefix for key, prefix in prefixes.items() if isinstance(prefix, str)}
    wanted = {'data_root': '', **folders, 'ann_file': dataset.get('ann_file') or ''}
    for key, value in wanted.items():
        path = os.path.join(root, value)
        if path and not os.path.exists(path):
            advice = elsewhere(option, 'data_root', root or path)
            raise ConfigError(f'{option}.{key}: {os.path.abspath(path)} does not exist; {advice}')
    if coco and not os.path.isfile(annotation_path(dataset)):
        raise ConfigError(f'{option}.ann_file: {annotation_path(dataset)} is no file')
    if (coco or segmentation) and not dataset.get('pipeline'):
        raise ConfigError(f'{option}.pipeline: missing, or empty; nothing would read the images')
    if coco:
        return check_coco(option, dataset, scope, trains)
    if segmentation:
        check_segmentation_classes(option, dataset, scope)
        return check_label_maps(option, dataset, scope)
    return []
