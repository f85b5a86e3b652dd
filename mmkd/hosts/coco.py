"""COCO annotation files: what mmdet needs of one, and what it would pass over in silence."""

import functools
import gc
import json
import mmap
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mmkd.errors import ConfigError
from mmkd.values import is_number

KEYS = ('images', 'annotations', 'categories')
OUTSIDE = 0.1
"""The share of boxes beyond their image from which a file is refused; some tools draw a box a little too large."""
OUTLINE = re.compile(rb'"segmentation"\s*:\s*\[[\d\s.,eE+\-\[\]]+(?=\]\s*[,}])')
"""The corners of polygons, most of COCO's bytes, which nobody has to parse to know that they are there."""
SLACK = 0.02
"""By how much of the image's side a box may reach beyond it unnoticed."""


class CocoFile(NamedTuple):
    """What is known of an annotation file once it was read."""

    categories: tuple[str, ...]
    """Their names, in the file's order."""
    images: dict[Any, tuple[str, float, float]]
    """File name, width and height, by the image's id."""
    annotated: frozenset
    """The ids of images that have annotations."""
    boxes: int
    """How many boxes mmdet would train on."""
    without_mask: Any
    """The id of an annotation without segmentation; None where all have one."""
    warnings: tuple[str, ...]


def read_coco(path: str) -> CocoFile:
    """Read an annotation file once, however often it is asked for.

    Raises:
        ConfigError: naming the file, the image or annotation, and what is wrong with it.
    """
    found = os.stat(path)
    collects = gc.isenabled()
    gc.disable()  # millions of small objects, none of which is garbage: half the time
    try:
        return _read(path, found.st_mtime_ns, found.st_size)
    finally:
        if collects:
            gc.enable()


@functools.lru_cache(maxsize=8)
def _read(path: str, changed: int, size: int) -> CocoFile:
    if not size:
        raise ConfigError(f'{path} is empty')
    content = _content(path)
    categories = dict(zip(*_columns(path, 'categories', content['categories'], 'id', 'name')))
    ids, *described = _columns(path, 'images', content['images'], 'id', 'file_name', 'width', 'height')
    images = dict(zip(ids, zip(*described)))
    if not categories:
        raise ConfigError(f'{path} lists no categories')
    if not images:
        raise ConfigError(f'{path} lists no images')
    for image, (name, width, height) in images.items():
        if not isinstance(name, str) or not all(is_number(side) and side > 0 for side in (width, height)):
            raise ConfigError(
                f'{path}: image id={image!r} has file_name={name!r}, width={width!r}, height={height!r}; expected a name and '
                f'the size in pixels'
            )
    _refuse_repeated(path, 'image', ids)
    return _with_annotations(path, categories, images, content['annotations'])


def _content(path: str) -> dict:
    """The file's content, which has all of :data:`KEYS`; of outlines it only says whether there are any."""
    try:
        with open(path, 'rb') as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole:
            content = json.loads(OUTLINE.sub(b'"segmentation": [1', whole).decode())
    except UnicodeDecodeError:
        raise ConfigError(f'{path} is not a COCO annotation file (it is not UTF-8)') from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f'{path} is not a COCO annotation file ({error})') from None
    if not isinstance(content, dict):
        raise ConfigError(f'{path} is not a COCO annotation file (it is no JSON object)')
    missing = [key for key in KEYS if not isinstance(content.get(key), list)]
    if missing:
        raise ConfigError(f'{path} is not a COCO annotation file (it lacks {", ".join(missing)})')
    return content


def _columns(path: str, kind: str, entries: Sequence[Any], *keys: str) -> list[list]:
    """The values of these keys in all entries of a kind, a list each; ids have to be numbers or strings."""
    try:
        columns = [[each[key] for each in entries] for key in keys]
        ids = [column for key, column in zip(keys, columns) if key.endswith('id')]
        if all(set(map(type, column)) <= {int, float, str} for column in ids):
            return columns
    except (KeyError, TypeError):
        pass
    for index, each in enumerate(entries):
        if not isinstance(each, Mapping):
            raise ConfigError(f'{path}: {kind}, number {index}, is {each!r}; expected an object')
        which = f'id={each["id"]!r}' if isinstance(each.get('id'), (int, str)) else f'number {index}'
        for key in keys:
            if key not in each:
                raise ConfigError(f'{path}: {kind}, {which}, has no {key}')
            if key.endswith('id') and not isinstance(each[key], (int, float, str)):
                raise ConfigError(f'{path}: {kind}, {which}, has {key}={each[key]!r}; expected a number or a string')
    raise AssertionError(f'{path}: {kind} without fault')


def _refuse_repeated(path: str, kind: str, ids: Sequence[Any]) -> None:
    if len(set(ids)) < len(ids):
        repeated = next(each for each, count in Counter(ids).items() if count > 1)
        raise ConfigError(f'{path}: {kind} id={repeated!r} is there twice; ids have to be unique')


def _with_annotations(
    path: str,
    categories: Mapping[Any, str],
    images: dict[Any, tuple[str, float, float]],
    annotations: Sequence[Mapping],
) -> CocoFile:
    ids, of_image, of_category = _columns(path, 'annotations', annotations, 'id', 'image_id', 'category_id')
    _refuse_repeated(path, 'annotation', ids)
    warnings = []
    strangers = sum(image not in images for image in of_image)
    if annotations and strangers == len(annotations):
        raise ConfigError(
            f'{path}: no annotation is of an image of this file; the first has image_id={of_image[0]!r}, and the first image '
            f'id={next(iter(images))!r}'
        )
    if strangers:
        warnings.append(
            f'{path}: {strangers} of {len(annotations)} annotations are of images that the file does not list.'
        )
    for index, category in enumerate(of_category):
        if category not in categories:
            raise ConfigError(
                f'{path}: annotation id={ids[index]!r} has category_id={category!r}, which is none of the categories '
                f'({", ".join(map(repr, list(categories)[:5]))}{", ..." if len(categories) > 5 else ""})'
            )
    own = [each for each in annotations if each['image_id'] in images and not each.get('ignore')]
    areas = [each.get('area') for each in own]
    if not set(map(type, areas)) <= {int, float}:
        first = next(each for each in own if not is_number(each.get('area')))
        raise ConfigError(
            f'{path}: annotation id={first["id"]!r} has area={first.get("area")!r}; mmdet expects a number of pixels, such as '
            f'width * height of the box'
        )
    kept = 0
    if own:
        boxes = _boxes(path, own)
        sizes = np.array([images[each['image_id']][1:] for each in own], float)
        warnings += _compare_boxes(path, own, boxes, sizes)
        overlap = np.minimum(boxes[:, :2] + boxes[:, 2:], sizes) - np.maximum(boxes[:, :2], 0)
        area = np.array(areas)
        # what mmdet's CocoDataset asks of a box
        usable = (overlap > 0).all(1) & (area > 0) & (boxes[:, 2:] >= 1).all(1)
        kept = int(usable.sum())
        if kept < 0.99 * len(own):
            first = own[int(usable.argmin())]
            warnings.append(
                f'{path}: mmdet leaves out {len(own) - kept} of {len(own)} boxes, which are smaller than a pixel, outside the '
                f'image or of no area, such as bbox={first["bbox"]} of annotation id={first["id"]!r}.'
            )
    return CocoFile(
        tuple(categories.values()),
        images,
        frozenset(each['image_id'] for each in own),
        kept,
        next((each['id'] for each in own if not each.get('segmentation')), None),
        tuple(warnings),
    )


def _boxes(path: str, annotations: Sequence[Mapping]) -> np.ndarray:
    """All boxes, (n, 4)."""
    try:
        boxes = np.array([each['bbox'] for each in annotations])
        if boxes.ndim == 2 and boxes.shape[1] == 4 and boxes.dtype.kind in 'fiu' and np.isfinite(boxes).all():
            return boxes.astype(float)
    except (KeyError, TypeError, ValueError):
        pass
    for each in annotations:
        box = each.get('bbox')
        if not (isinstance(box, list) and len(box) == 4 and all(map(is_number, box))):
            raise ConfigError(
                f'{path}: annotation id={each["id"]!r} has bbox={box!r}; expected [x, y, width, height] in pixels'
            )
    return np.array([each['bbox'] for each in annotations], float)


def _compare_boxes(path: str, annotations: Sequence[Mapping], boxes: np.ndarray, sizes: np.ndarray) -> list[str]:
    """Refuse boxes that are not pixels, or corners instead of sizes."""
    if boxes.max() <= 2 and sizes.min() > 2:
        raise ConfigError(
            f'{path}: no box reaches beyond 2 pixels, such as bbox={annotations[0]["bbox"]} of annotation '
            f'id={annotations[0]["id"]!r}; expected [x, y, width, height] in pixels, not fractions of the image'
        )
    slack = 2 + SLACK * sizes
    beyond = ((boxes[:, :2] + boxes[:, 2:] > sizes + slack) | (boxes[:, :2] < -slack)).any(1)
    if not beyond.any():
        return []
    first = annotations[int(beyond.argmax())]
    width, height = sizes[int(beyond.argmax())]
    found = (
        f'{path}: {int(beyond.sum())} of {len(boxes)} boxes reach beyond their image, such as bbox={first["bbox"]} of '
        f'annotation id={first["id"]!r} in {width:g}x{height:g}'
    )
    corners = (boxes[:, 2:] > boxes[:, :2]).all() and (boxes[:, 2:] <= sizes + slack).all()
    if corners:
        raise ConfigError(f'{found}; they look like corners [x1, y1, x2, y2], where [x, y, width, height] is expected')
    if beyond.mean() > OUTSIDE:
        raise ConfigError(f'{found}; expected [x, y, width, height] in pixels, and the size of the image as it is')
    return [f'{found}.']
