"""Whether a COCO data set can be trained on: its annotations, categories and images, and the evaluator's file."""

import os
from collections.abc import Mapping

from mmkd.errors import ConfigError
from mmkd.hosts.coco import CocoFile, read_coco
from mmkd.hosts.datasets import (
    annotation_path,
    class_names,
    image_folder,
    loading,
    read_image,
    spread,
)

SAMPLE = 5
"""How many images are opened."""
MOST_FOLDERS = 1000
"""With images in more folders than these, only those that are opened are looked for."""


def check_coco(option: str, dataset: Mapping, scope: str | None, trains: bool) -> list[str]:
    """Check the annotation file and the images of a data set that mmdet's ``CocoDataset`` reads.

    Args:
        option: What the data set is called in the config.
        dataset: Its config.
        scope: The default scope.
        trains: Whether it is trained on, for which it needs boxes.

    Raises:
        ConfigError: naming the file and what mmdet could not read, or would read as something else.

    Returns:
        Warnings, a line each.
    """
    path = annotation_path(dataset)
    try:
        content = read_coco(path)
    except ConfigError as error:
        raise ConfigError(f'{option}.ann_file: {error}') from None
    _compare_categories(option, dataset, path, content.categories, scope)
    _check_images(option, dataset, path, content)
    if trains and not content.boxes:
        raise ConfigError(f'{option}.ann_file: {path} has no box to train on')
    step = loading(dataset, 'LoadAnnotations')
    if step and step.get('with_mask') and content.without_mask is not None:
        raise ConfigError(
            f'{option}.ann_file: {path}: annotation id={content.without_mask!r} has no segmentation, which with_mask=True of '
            f'the pipeline asks for'
        )
    return [f'{option}.ann_file: {line}' for line in content.warnings]


def _compare_categories(option: str, dataset: Mapping, path: str, names: tuple[str, ...], scope: str | None) -> None:
    """Check a file's categories against the classes: all there, and in the order that labels will have."""
    classes = class_names(dataset, option, scope)
    if classes is None:
        return
    # the data set class's own, of which a file may have some
    stock = not (dataset.get('metainfo') or {}).get('classes')
    labels = tuple(name for name in names if name in classes)
    unknown = [name for name in classes if name not in names]
    if stock:
        if not labels or labels != classes[: len(labels)]:
            found = "COCO's categories not as mmdet would number them" if labels else "none of COCO's categories"
            raise ConfigError(
                f'{option}.ann_file: {path} has {found}; name yours with {option}.metainfo=dict(classes={names}), and set '
                f'num_classes={len(names)} in the model'
            )
    elif unknown:
        raise ConfigError(
            f'{option}.ann_file: {path} has no category {unknown[0]!r}, which {option}.metainfo.classes names; its '
            f'categories are {list(names)}'
        )
    elif labels != classes:
        raise ConfigError(
            f'{option}.metainfo.classes: {classes} is not the order of the categories in {path}, by which mmdet numbers '
            f'the labels whatever the order here; write classes={labels}'
        )


def _check_images(option: str, dataset: Mapping, path: str, content: CocoFile) -> None:
    """Check that all images are there that will be read, and that some of them are what the file says."""
    wanted = list(content.images)
    if (dataset.get('filter_cfg') or {}).get('filter_empty_gt') and not dataset.get('test_mode'):
        wanted = [image for image in wanted if image in content.annotated]
    folder = image_folder(dataset)
    sample = spread(wanted, SAMPLE)
    folders = {os.path.dirname(content.images[image][0]) for image in wanted}
    looked_for = wanted if len(folders) <= MOST_FOLDERS else sample
    there = {each: _names(os.path.join(folder, each)) for each in folders} if looked_for is wanted else {}
    missing = [
        name
        for name, _, _ in (content.images[image] for image in looked_for)
        if not (os.path.basename(name) in there[os.path.dirname(name)] if there else _is_file(folder, name))
    ]
    if missing:
        others = f', and {len(missing) - 1} others' if len(missing) > 1 else ''
        raise ConfigError(
            f'{option}.ann_file: {path} lists {missing[0]!r}, which is not in {os.path.abspath(folder)}{others}; see '
            f'{option}.data_prefix.img, to which file_name is added'
        )
    for image in sample:
        name, width, height = content.images[image]
        try:
            found = read_image(os.path.join(folder, name), loading(dataset, 'LoadImageFromFile')).shape[1::-1]
        except (OSError, ValueError) as error:
            raise ConfigError(f'{option}: {os.path.join(folder, name)} cannot be read as an image ({error})') from None
        if found != (width, height):
            turned = ', as its EXIF orientation turns it' if found == (height, width) else ''
            raise ConfigError(
                f'{option}.ann_file: {path} says {width:g}x{height:g} for {name!r}, which is {found[0]}x{found[1]}{turned}'
            )


def _names(folder: str) -> set[str]:
    try:
        return set(os.listdir(folder or '.'))
    except OSError:
        return set()


def _is_file(folder: str, name: str) -> bool:
    return os.path.isfile(os.path.join(folder, name))


def compare_evaluator(option: str, metric_file: str, dataset: Mapping) -> list[str]:
    """Check that a metric's annotation file is of the images that are evaluated; predictions are told apart by ids.

    Raises:
        ConfigError: where images are other ones, or missing.

    Returns:
        A warning where the metric has more images.
    """
    own, path = annotation_path(dataset), os.path.abspath(metric_file)
    if os.path.realpath(own) == os.path.realpath(metric_file):
        return []
    try:
        expected, found = read_coco(own).images, read_coco(metric_file).images
    except ConfigError as error:
        raise ConfigError(f'{option}.ann_file: {error}') from None
    for image, (name, _, _) in expected.items():
        if image not in found or found[image][0] != name:
            other = f'{found[image][0]!r}' if image in found else 'no image'
            raise ConfigError(
                f'{option}.ann_file: {path} has {other} with id={image!r}, which is {name!r} in {own}, the file of the images '
                f'that are evaluated; name the same file for both'
            )
    if len(found) > len(expected):
        return [f'{option}.ann_file: {path} has {len(found)} images, of which {len(expected)} are evaluated.']
    return []
