"""Whether a segmentation data set can be trained on: its classes, images and label maps."""

import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmkd.errors import ConfigError
from mmkd.hosts.datasets import (
    annotation_path,
    class_names,
    dataset_class,
    loading,
    names_below,
    read_image,
    spread,
    type_name,
)

SAMPLE = 5
"""How many label maps are opened, with their images."""
LONGER_SAMPLE = 50
"""How many where these look as if a class were missing."""
IGNORED = 255


def check_segmentation_classes(option: str, dataset: Mapping, scope: str | None) -> None:
    """Check that there are classes, and as many colours, as mmseg asks for at the first evaluation at the latest.

    Raises:
        ConfigError: with what to write.
    """
    classes = class_names(dataset, option, scope)
    if not classes:
        raise ConfigError(
            f"{option}: {type_name(dataset)} has no classes of its own; name yours with metainfo=dict(classes=('background', "
            f"'cell'), palette=[[0, 0, 0], [255, 0, 0]])"
        )
    stock = getattr(dataset_class(dataset, scope), 'METAINFO', {})
    other = [name for name in classes if stock.get('classes') and name not in stock['classes']]
    if other:
        raise ConfigError(
            f'{option}.metainfo.classes: {other[0]!r} is no class of {type_name(dataset)}; for classes of your own use '
            f"type='BaseSegDataset' with img_suffix and seg_map_suffix"
        )
    palette = (dataset.get('metainfo') or {}).get('palette', stock.get('palette', ()))
    subset = bool(stock.get('classes')) and tuple(stock['classes']) != classes
    if palette and len(palette) != len(classes) and not (subset and len(palette) >= len(classes)):
        raise ConfigError(
            f'{option}.metainfo.palette has {len(palette)} colours for {len(classes)} classes; give one for each class, or none'
        )


class Files(NamedTuple):
    """Where mmseg's ``BaseSegDataset`` looks for images and label maps."""

    images: Path
    labels: Path | None
    """None where no labels are read."""
    image_suffix: str
    label_suffix: str
    names: list[str]
    """Of the images, without suffix, as paths from their folder."""


def check_label_maps(option: str, dataset: Mapping, scope: str | None) -> list[str]:
    """Check that all images and label maps are there, and that some of them are what mmseg takes.

    Args:
        option: What the data set is called in the config.
        dataset: Its config, of a class that reads its files as ``BaseSegDataset`` does.
        scope: The default scope.

    Raises:
        ConfigError: naming the file and what is wrong with it.

    Returns:
        Warnings, a line each.
    """
    defaults = _defaults(dataset_class(dataset, scope))
    files = _files(option, dataset, defaults)
    if files.labels is None:
        return []
    there = names_below(files.labels)
    missing = [name for name in files.names if name + files.label_suffix not in there]
    if missing:
        others = f', nor do {len(missing) - 1} others' if len(missing) > 1 else ''
        advice = f'see {option}.seg_map_suffix'
        if files.label_suffix.endswith('_labelTrainIds.png'):
            advice = 'python tools/dataset_converters/cityscapes.py data/cityscapes, in a clone of mmseg, makes them'
        path = (files.labels / (missing[0] + files.label_suffix)).absolute()
        raise ConfigError(
            f'{option}.data_prefix.seg_map_path: {path} does not exist{others}, the label map of '
            f'{missing[0]}{files.image_suffix}; {advice}'
        )
    classes = class_names(dataset, option, scope) or ()
    reading = loading(dataset, 'LoadAnnotations')
    if reading is None or type_name(reading) != 'LoadAnnotations':  # one of a user's, or for other formats
        return []
    return _check_values(option, dataset, files, classes, _Mapping.of(dataset, defaults, classes, scope))


def _defaults(kind: type | None) -> dict[str, Any]:
    parameters = inspect.signature(kind).parameters if kind is not None else {}
    wanted = ('img_suffix', 'seg_map_suffix', 'reduce_zero_label')
    return {key: parameters[key].default for key in wanted if key in parameters}


def _files(option: str, dataset: Mapping, defaults: Mapping[str, Any]) -> Files:
    root, prefix = dataset.get('data_root') or '', dataset.get('data_prefix') or {}
    folder = Path(root, prefix.get('img_path') or '')
    suffix, label_suffix = (
        dataset.get(key) or defaults.get(key, stock)
        for key, stock in (('img_suffix', '.jpg'), ('seg_map_suffix', '.png'))
    )
    listed = annotation_path(dataset) if dataset.get('ann_file') else ''
    there = names_below(folder)
    if os.path.isfile(listed):
        lines = Path(listed).read_text(encoding='utf-8').splitlines()
        names = [line.strip() for line in lines]
        missing = [name for name in names if name + suffix not in there]
        if missing:
            raise ConfigError(
                f'{option}.ann_file: {listed} lists {missing[0]!r}, and {(folder / (missing[0] + suffix)).absolute()} does not '
                f'exist; one name in each line is expected, without {option}.img_suffix'
            )
    else:
        names = sorted(name.removesuffix(suffix) for name in there if name.endswith(suffix))
    if not names:
        raise ConfigError(
            f'{option}.data_prefix.img_path: {folder.absolute()} has no file that ends with {suffix!r}; see '
            f"{option}.img_suffix, and mmseg's docs on preparing data sets"
            if not listed
            else f'{option}.ann_file: {listed} is empty'
        )
    reads = loading(dataset, 'LoadAnnotations') is not None
    labels = prefix.get('seg_map_path') if reads else None
    return Files(folder, None if labels is None else Path(root, labels), suffix, label_suffix, names)


class _Mapping(NamedTuple):
    """What becomes of a label map's values when mmseg reads it."""

    reduce_zero_label: bool
    new: dict[int, int] | None
    """For a part of the classes of the data set's own."""

    @classmethod
    def of(cls, dataset: Mapping, defaults: Mapping, classes: tuple[str, ...], scope: str | None) -> '_Mapping':
        reduces = bool(dataset.get('reduce_zero_label', defaults.get('reduce_zero_label', False)))
        stock = getattr(dataset_class(dataset, scope), 'METAINFO', {}).get('classes')
        if not stock or tuple(stock) == classes:
            return cls(reduces, None)
        return cls(
            reduces, {old: classes.index(name) if name in classes else IGNORED for old, name in enumerate(stock)}
        )

    def apply(self, values: np.ndarray) -> np.ndarray:
        if self.reduce_zero_label:
            values = np.where(values == 0, IGNORED, np.where(values == IGNORED, IGNORED, values - 1))
        if self.new is not None:
            values = np.array([self.new.get(int(value), int(value)) for value in values])
        return values


def _check_values(
    option: str, dataset: Mapping, files: Files, classes: tuple[str, ...], mapping: _Mapping
) -> list[str]:
    """Open some label maps and their images."""
    assert files.labels is not None
    ignored = {IGNORED, dataset.get('ignore_index', IGNORED)}
    found: set[int] = set()
    for name in spread(files.names, SAMPLE):
        path = files.labels / (name + files.label_suffix)
        labels = _read(option, path, loading(dataset, 'LoadAnnotations'), 'unchanged').squeeze()
        if labels.ndim != 2:
            raise ConfigError(
                f'{option}: {path} has {labels.shape[-1]} channels; a label map has one, the number of the class at each pixel'
            )
        loader = loading(dataset, 'LoadImageFromFile')
        if loader is not None and type_name(loader) == 'LoadImageFromFile':
            image = files.images / (name + files.image_suffix)
            size = _read(option, image, loader, 'color').shape[:2]
            if size != labels.shape:
                raise ConfigError(
                    f'{option}: {path} is {labels.shape[1]}x{labels.shape[0]}, and its image {image} {size[1]}x{size[0]}'
                )
        values = np.unique(labels)
        if values.max() > 255:
            raise ConfigError(
                f'{option}: {path} has the value {values.max()}, of which mmseg reads the lowest 8 bits alone'
            )
        values = mapping.apply(values.astype(int))
        wrong = [value for value in values.tolist() if value not in ignored and not 0 <= value < len(classes)]
        if wrong:
            raise ConfigError(
                f'{option}: {path} has a pixel of class {wrong[0]}, and there are {len(classes)} classes, counted from 0 '
                f'({", ".join(classes[:5])}{", ..." if len(classes) > 5 else ""}); {IGNORED} is ignored'
            )
        found |= set(values.tolist())
    if found == {0, IGNORED} and len(classes) > 1 and not _has_more(option, dataset, files, mapping):
        advice = 'leave out reduce_zero_label' if mapping.reduce_zero_label else f'write 1 instead of {IGNORED}'
        raise ConfigError(
            f'{option}: label maps such as {path} hold 0 and {IGNORED} alone, and {IGNORED} is ignored: no pixel is of class '
            f'{classes[1]!r}; {advice}'
        )
    if found == {IGNORED}:
        return [f'{option}: no pixel of {SAMPLE} label maps has a class, all are {IGNORED}, which is ignored.']
    return []


def _has_more(option: str, dataset: Mapping, files: Files, mapping: _Mapping) -> bool:
    """Whether any of more label maps has other values than 0 and the ignored one."""
    assert files.labels is not None
    step = loading(dataset, 'LoadAnnotations')
    for name in spread(files.names, LONGER_SAMPLE):
        values = np.unique(_read(option, files.labels / (name + files.label_suffix), step, 'unchanged')).astype(int)
        if set(mapping.apply(values).tolist()) - {0, IGNORED}:
            return True
    return False


def _read(option: str, path: Path, step: Mapping | None, flag: str) -> np.ndarray:
    try:
        return read_image(path, step, flag)
    except (OSError, ValueError) as error:
        raise ConfigError(f'{option}: {path} cannot be read as an image ({error})') from None
