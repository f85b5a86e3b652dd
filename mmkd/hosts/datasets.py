"""Read the data sets of a config without building them: those inside wrappers, their classes, files and images."""

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from mmengine.fileio import list_from_file
from mmengine.registry import DATASETS, Registry

from mmkd.errors import ConfigError, describe

T = TypeVar('T')


def type_name(spec: Mapping) -> str:
    """The last part of a config's ``type``, which is a name, a dotted path or a class; '' without one."""
    kind = spec.get('type', '')
    return kind.rpartition('.')[2] if isinstance(kind, str) else getattr(kind, '__name__', str(kind))


def datasets(dataset: Mapping, option: str) -> Iterator[tuple[str, Mapping]]:
    """The data sets inside wrappers such as ``RepeatDataset`` and ``ConcatDataset``, each with its option's name."""
    if 'dataset' in dataset:
        yield from datasets(dataset['dataset'], f'{option}.dataset')
    elif 'datasets' in dataset:
        for index, each in enumerate(dataset['datasets']):
            yield from datasets(each, f'{option}.datasets.{index}')
    else:
        yield option, dataset


def without_workers(loader: Mapping) -> dict[str, Any]:
    """A data loader's config for a few batches in this process."""
    workers = ('prefetch_factor', 'timeout', 'pin_memory')
    kept = {option: copy.deepcopy(value) for option, value in loader.items() if option not in workers}
    return {**kept, 'num_workers': 0, 'persistent_workers': False}


def local(spec: Mapping) -> bool:
    """Whether a data set's or metric's files are on this machine's disks."""
    return (spec.get('backend_args') or {}).get('backend', 'local') == 'local'


def named_class(spec: Mapping, registry: Registry, scope: str | None) -> Any:
    """The class or function that a config dict names in a registry of mmengine; None where it cannot be found."""
    kind = spec.get('type')
    if not isinstance(kind, str):
        return kind
    scope = spec.get('_scope_', scope)
    return registry.get(kind if '.' in kind or scope is None else f'{scope}.{kind}')


def dataset_class(dataset: Mapping, scope: str | None) -> type | None:
    """The class of a data set's config; None where it cannot be found."""
    return named_class(dataset, DATASETS, scope)


def is_coco(dataset: Mapping, scope: str | None) -> bool:
    """Whether a data set reads a COCO file as mmdet's ``CocoDataset`` does, which numbers labels in the file's order."""
    kind = dataset_class(dataset, scope)
    if kind is None:
        return type_name(dataset) == 'CocoDataset'
    return _reader(kind) == 'CocoDataset'


def is_segmentation(dataset: Mapping, scope: str | None) -> bool:
    """Whether a data set finds images and label maps as mmseg's ``BaseSegDataset`` does."""
    kind = dataset_class(dataset, scope)
    return kind is not None and _reader(kind) == 'BaseSegDataset'


def _reader(kind: type) -> str:
    """The name of the class whose reading of files a data set's class inherits."""
    return next((each for each in kind.__mro__ if 'load_data_list' in vars(each)), kind).__name__


def annotation_path(dataset: Mapping) -> str:
    """Where a data set's annotation file is."""
    return os.path.join(dataset.get('data_root') or '', dataset.get('ann_file') or '')


def class_names(dataset: Mapping, option: str, scope: str | None) -> tuple[str, ...] | None:
    """The classes that a data set has by its ``metainfo`` or, without, by its own class; None where neither says.

    Raises:
        ConfigError: for a string that is no file of names.
    """
    names = (dataset.get('metainfo') or {}).get('classes')
    if names is None:
        names = getattr(dataset_class(dataset, scope), 'METAINFO', {}).get('classes')
    if isinstance(names, str):
        if not Path(names).is_file():
            raise ConfigError(
                f'{option}.metainfo.classes={names!r}: expected a tuple of names, such as ({names!r},), or a file with one '
                f'name in each line'
            )
        names = list_from_file(names)
    repeated = [name for index, name in enumerate(names or ()) if name in names[:index]]
    if repeated:
        raise ConfigError(f'{option}.metainfo.classes: {repeated[0]!r} is there twice')
    return tuple(names) if names else None


def image_folder(dataset: Mapping) -> str:
    """Where a detection data set's images are."""
    prefix = dataset.get('data_prefix') or {}
    return os.path.join(dataset.get('data_root') or '', prefix.get('img_path', prefix.get('img', '')) or '')


def names_below(folder: str | Path) -> set[str]:
    """The files in a folder and those below it, as paths from there with ``/``."""
    return {
        os.path.relpath(os.path.join(root, name), folder).replace(os.sep, '/')
        for root, _, names in os.walk(folder, followlinks=True)
        for name in names
        if not name.startswith('.')
    }


def loading(dataset: Mapping, step: str) -> Mapping | None:
    """The first step of a data set's pipeline whose class's name ends so; None where there is none."""
    return next((each for each in dataset.get('pipeline') or () if type_name(each).endswith(step)), None)


def read_image(path: str | Path, step: Mapping | None, flag: str = 'color') -> np.ndarray:
    """An image as a step of a pipeline would decode it.

    Raises:
        ValueError: if it is none.
    """
    import mmcv  # what mmdet and mmseg need anyway; the core does not

    stock = 'cv2' if flag == 'color' else 'pillow'
    try:
        image = mmcv.imfrombytes(
            Path(path).read_bytes(), flag=flag, backend=(step or {}).get('imdecode_backend') or stock
        )
    except Exception as error:  # of the decoder that is named
        raise ValueError(describe(error)) from error
    if image is None:
        raise ValueError('no decoder takes it')
    return image


def spread(items: Sequence[T], count: int) -> list[T]:
    """``count`` of the items, from the first to the last at equal distances; all where there are no more."""
    if len(items) <= count:
        return list(items)
    return [items[round(index * (len(items) - 1) / (count - 1))] for index in range(count)]
