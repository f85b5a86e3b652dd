"""Whether the files of data loaders and evaluators are there, and can be what the config takes them for."""

import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from mmengine.config import Config

from mmkd.errors import ConfigError
from mmkd.hosts.datasets import (
    annotation_path,
    class_names,
    coco_categories,
    dataset_class,
    datasets,
    is_coco,
    local,
    type_name,
)

WHICH = {'train': 'train_dataloader.dataset', 'val': 'val_dataloader.dataset', 'test': 'test_dataloader.dataset'}
TRY = 'to try mmkd without any download: make demo, make demo-seg'


def check_data(config: Config, parts: Sequence[str]) -> None:
    """Check that the files of the data loaders and evaluators of ``train``, ``val`` or ``test`` are there.

    Raises:
        ConfigError: naming the option, the path, and how to point to another.
    """
    for part in parts:
        for option, dataset in part_datasets(config, part):
            _check_dataset(option, dataset, config.get('default_scope'))
        evaluator = config.get(f'{part}_evaluator')
        for index, metric in enumerate(evaluator if isinstance(evaluator, list) else [evaluator or {}]):
            path = metric.get('ann_file')
            if path and local(metric) and not os.path.exists(path):
                option = f'{part}_evaluator.{index}' if isinstance(evaluator, list) else f'{part}_evaluator'
                raise ConfigError(
                    f'{option}.ann_file: {os.path.abspath(path)} does not exist; {elsewhere(option, "ann_file", path)}'
                )


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


def _check_dataset(option: str, dataset: Mapping, scope: str | None) -> None:
    if not local(dataset):
        return
    coco = is_coco(dataset, scope)
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
    if coco:
        _check_coco(option, dataset, scope)
    elif 'img_path' in prefixes and not dataset.get('ann_file'):
        _check_label_maps(option, dataset, scope)


def _check_coco(option: str, dataset: Mapping, scope: str | None) -> None:
    """Check a COCO file's categories against the classes: all there, and in the order that labels will have."""
    path = annotation_path(dataset)
    names = coco_categories(path, f'{option}.ann_file')
    classes = class_names(dataset, option, scope)
    if classes is None:
        return
    stock = not (dataset.get('metainfo') or {}).get(
        'classes'
    )  # the data set class's own, of which a file may have some
    labels = tuple(name for name in names if name in classes)
    unknown = [name for name in classes if name not in names]
    if stock:
        if not labels or labels != classes[: len(labels)]:
            found = "COCO's categories not as mmdet would number them" if labels else "none of COCO's categories"
            raise ConfigError(
                f'{option}.ann_file: {path} has {found}; name yours with {option}.metainfo=dict(classes={tuple(names)}), '
                f'and set num_classes={len(names)} in the model'
            )
    elif unknown:
        raise ConfigError(
            f'{option}.ann_file: {path} has no category {unknown[0]!r}, which {option}.metainfo.classes names; its '
            f'categories are {names}'
        )
    elif labels != classes:
        raise ConfigError(
            f'{option}.metainfo.classes: {classes} is not the order of the categories in {path}, by which mmdet numbers '
            f'the labels whatever the order here; write classes={labels}'
        )


def _check_label_maps(option: str, dataset: Mapping, scope: str | None) -> None:
    """Check that a folder for segmentation has images, and that the first one found has its label map."""
    kind = dataset_class(dataset, scope)
    options = inspect.signature(kind).parameters if kind is not None else {}
    stock = {key: options[key].default if key in options else None for key in ('img_suffix', 'seg_map_suffix')}
    suffixes = [dataset.get(key) or default for key, default in stock.items()]
    if None in suffixes:  # a data set of another kind
        return
    root = dataset.get('data_root') or ''
    folder = Path(root, dataset['data_prefix']['img_path'])
    image = next(folder.rglob(f'*{suffixes[0]}'), None)
    if image is None:
        raise ConfigError(
            f'{option}.data_prefix.img_path: {folder.absolute()} has no file that ends with {suffixes[0]!r}; see '
            f"{option}.img_suffix, and mmseg's docs on preparing data sets"
        )
    reads_labels = any(type_name(step).endswith('LoadAnnotations') for step in dataset.get('pipeline', ()))
    labels = dataset['data_prefix'].get('seg_map_path')
    if reads_labels and labels is not None:
        path = Path(root, labels, str(image.relative_to(folder)).removesuffix(suffixes[0]) + suffixes[1])
        if not path.is_file():
            advice = 'python tools/dataset_converters/cityscapes.py data/cityscapes, in a clone of mmseg, makes them'
            raise ConfigError(
                f'{option}.data_prefix.seg_map_path: {path.absolute()} does not exist, the label map of {image.name}'
                + (f'; {advice}' if suffixes[1].endswith('_labelTrainIds.png') else f'; see {option}.seg_map_suffix')
            )
