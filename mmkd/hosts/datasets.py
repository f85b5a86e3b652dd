"""Read the data sets of a config without building them: those inside wrappers, their classes, a COCO file's categories."""

import json
import logging
import mmap
import multiprocessing
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmengine.dataset import Compose
from mmengine.fileio import list_from_file
from mmengine.logging import print_log
from mmengine.registry import DATASETS

from mmkd.errors import ConfigError, Stopped


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


def local(spec: Mapping) -> bool:
    """Whether a data set's or metric's files are on this machine's disks."""
    return (spec.get('backend_args') or {}).get('backend', 'local') == 'local'


def dataset_class(dataset: Mapping, scope: str | None) -> type | None:
    """The class of a data set's config; None where it cannot be found."""
    kind = dataset.get('type')
    if not isinstance(kind, str):
        return kind
    scope = dataset.get('_scope_', scope)
    return DATASETS.get(kind if '.' in kind or scope is None else f'{scope}.{kind}')


def is_coco(dataset: Mapping, scope: str | None) -> bool:
    """Whether a data set reads a COCO file as mmdet's ``CocoDataset`` does, which numbers labels in the file's order."""
    kind = dataset_class(dataset, scope)
    if kind is None:
        return type_name(dataset) == 'CocoDataset'
    reader = next((each for each in kind.__mro__ if 'load_data_list' in vars(each)), kind)
    return reader.__name__ == 'CocoDataset'


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
    return tuple(names) if names else None


def coco_categories(path: str, option: str) -> list[str]:
    """The names of a COCO file's categories in their order, read without parsing all of the file.

    Raises:
        ConfigError: if it is no such file.
    """
    with open(path, 'rb') as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise ConfigError(f'{option}: {path} is empty')
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        missing = [key for key in ('images', 'annotations', 'categories') if content.find(f'"{key}"'.encode()) < 0]
        if missing or content[:64].lstrip()[:1] != b'{':
            reason = f'it lacks {", ".join(missing)}' if missing else 'it is no JSON object'
            raise ConfigError(f'{option}: {path} is not a COCO annotation file ({reason})')
        start = content.find(b'[', content.find(b'"categories"'))
        try:
            categories, _ = json.JSONDecoder().raw_decode(content[start : start + 2**22].decode('utf-8', 'ignore'))
            return [category['name'] for category in categories]
        except (ValueError, TypeError, KeyError):
            raise ConfigError(f'{option}: {path} is not a COCO annotation file (cannot read its categories)') from None


_may_leave_out = multiprocessing.Value('i', 0)  # data workers are forked, and share it


def leave_out_samples(most: int) -> None:
    """Have a training leave out up to so many samples that cannot be used, all data workers together, with a line each."""
    _may_leave_out.value = most


class NamedSamples(Compose):
    """A pipeline whose errors name the file of the sample that they arose with; see also :func:`leave_out_samples`."""

    def __init__(self, pipeline: Compose):
        self.transforms = pipeline.transforms

    def __call__(self, data: dict) -> dict | None:
        path = data.get('img_path') or data.get('sample_idx')
        labels = data.get('seg_map_path')
        try:
            return super().__call__(data)
        except Exception as error:
            where = f'{path} (labels {labels})' if labels else path
            reason = (str(error) or type(error).__name__).strip().splitlines()[0]
            line = f'sample {where} cannot be used: {type(error).__name__}: {reason}'
            with _may_leave_out.get_lock():
                left_out = _may_leave_out.value > 0
                _may_leave_out.value -= left_out
            if not left_out:
                raise Stopped(f'{line}; mend or remove it, or have --leave-out N leave out up to N of them') from error
            print_log(f'{line}; it is left out', logger='current', level=logging.WARNING)
            return None  # the data set then takes another


def name_samples(dataset: Any) -> None:
    """Have a data set, and those inside of wrappers, name the file of a sample that cannot be read."""
    if type(getattr(dataset, 'pipeline', None)) is Compose:
        dataset.pipeline = NamedSamples(dataset.pipeline)
    for inner in [getattr(dataset, 'dataset', None), *(getattr(dataset, 'datasets', None) or ())]:
        if inner is not None:
            name_samples(inner)
