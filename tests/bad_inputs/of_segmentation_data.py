"""Images, label maps and classes of segmentation data."""

from pathlib import Path

import cv2
import numpy as np
from table import Accepted, Case

PARTS = ('train', 'val', 'test')


def data(name: str, options: str, expected, **more) -> Case:
    """Options of all data sets."""
    text = '\n'.join(f'{part}_dataloader = dict(dataset=dict({options}))' for part in PARTS)
    return Case(name, expected, text, base='masks.py', **more)


def labels(name: str, change, expected, **more) -> Case:
    """All label maps changed; a function is given one and its number, and None removes it."""

    def write(place: Path) -> None:
        for index, path in enumerate(sorted((place / 'masks' / 'labels').iterdir())):
            changed = change(cv2.imread(str(path), cv2.IMREAD_UNCHANGED), index)
            path.unlink()
            if changed is not None:
                cv2.imwrite(str(path), changed)

    return Case(name, expected, base='masks.py', files=write, **more)


def files(name: str, change, expected, **more) -> Case:
    return Case(name, expected, base='masks.py', files=lambda place: change(place / 'masks'), **more)


def only(index: int, changed):
    """A change of one label map."""
    return lambda label, number: changed(label) if number == index else label


def head(name: str, options: str, expected) -> Case:
    return Case(name, expected, f'model = dict(student=dict({options}))', base='masks.py')


CASES = [
    data('a root with a typo', "data_root='msks'", r'train_dataloader.dataset.data_root: .*/msks does not exist'),
    data(
        'an image folder with a typo',
        "data_prefix=dict(img_path='imgs')",
        r'data_prefix.img_path: .*/imgs does not exist',
    ),
    data(
        'a label folder with a typo',
        "data_prefix=dict(seg_map_path='lables')",
        r'data_prefix.seg_map_path: .*/lables does not exist',
    ),
    data(
        'images of another suffix',
        "img_suffix='.jpeg'",
        r"has no file that ends with '.jpeg'; see train_dataloader.dataset.img_suffix",
    ),
    data('the stock suffix for other images', "img_suffix='.jpg'", r"has no file that ends with '.jpg'"),
    data(
        'labels of another suffix',
        "seg_map_suffix='_label.png'",
        r'000_label.png does not exist, nor do 5 others, the label map of 000.png; see',
    ),
    data(
        'classes forgotten',
        'metainfo=dict(_delete_=True)',
        r'BaseSegDataset has no classes of its own; name yours with metainfo',
    ),
    data(
        'classes without a comma',
        "metainfo=dict(classes=('cell'))",
        r"metainfo.classes='cell': expected a tuple of names",
    ),
    data(
        'fewer colours than classes',
        'metainfo=dict(palette=[[0, 0, 0]])',
        r'metainfo.palette has 1 colours for 2 classes',
    ),
    data(
        'more colours than classes',
        'metainfo=dict(palette=[[0, 0, 0]] * 3)',
        r'metainfo.palette has 3 colours for 2 classes',
    ),
    data(
        "classes of one's own in a stock data set",
        "_delete_=True, type='CityscapesDataset', data_root='masks', "
        "data_prefix=dict(img_path='images', seg_map_path='labels'), metainfo=dict(classes=('background', 'cell')), "
        "pipeline=[dict(type='LoadImageFromFile'), dict(type='LoadAnnotations')]",
        r"'background' is no class of CityscapesDataset; .*type='BaseSegDataset'",
    ),
    data(
        'more classes than the head',
        "metainfo=dict(classes=('a', 'b', 'c'), palette=[[0, 0, 0]] * 3)",
        r'_head.num_classes=2: train_dataloader.dataset has 3 classes',
    ),
    data(
        'a type with a typo',
        "type='BaseSegDatset'",
        r"dataset.type='BaseSegDatset': there is no such dataset in mmseg; .*'BaseSegDataset'",
    ),
    data('a type of the other task', "type='CocoDataset'", r'there is no such dataset in mmseg'),
    data(
        'an option with a typo', "image_suffix='.png'", r"BaseSegDataset has no option 'image_suffix'; .*'img_suffix'"
    ),
    data(
        'an option of a transform with a typo',
        "pipeline=[dict(type='LoadAnnotations', reduce_zero=True)]",
        r"LoadAnnotations has no option 'reduce_zero'",
    ),
    data('a list of names that is not there', "ann_file='train.txt'", r'dataset.ann_file: .*train.txt does not exist'),
    data(
        'a list of names with suffixes',
        "ann_file='train.txt'",
        r"train.txt lists '000.png', and .*000.png.png does not exist; one name in each line",
        files=lambda place: (place / 'masks/train.txt').write_text('000.png\n001.png\n'),
    ),
    data(
        'a list that is empty',
        "ann_file='train.txt'",
        r'train.txt is empty',
        files=lambda place: (place / 'masks/train.txt').touch(),
    ),
    data(
        'zero reduced, where 0 is a class',
        'reduce_zero_label=True',
        r"no pixel is of class 'cell'; leave out reduce_zero_label",
    ),
    head(
        "the head's classes forgotten",
        'decode_head=dict(num_classes=19)',
        r'decode_head.num_classes=19: train_dataloader.dataset has 2 classes',
    ),
    head(
        "the auxiliary head's classes forgotten",
        'auxiliary_head=dict(num_classes=19)',
        r'auxiliary_head.num_classes=19: train_dataloader.dataset has 2',
    ),
    head('a head with a typo', "decode_head=dict(type='PSPHed')", r"decode_head.type='PSPHed': .*'PSPHead'"),
    head('a layer of the backbone that is not there', 'decode_head=dict(in_index=7)', r'cannot be run as far as'),
    head('channels of another layer', 'decode_head=dict(in_channels=32)', r'cannot be run as far as'),
    labels(
        'masks of 0 and 255',
        lambda label, index: label * 255,
        r"hold 0 and 255 alone, and 255 is ignored: no pixel is of class 'cell'; write 1",
    ),
    labels(
        'a value beyond the classes',
        lambda label, index: label * 7,
        r'has a pixel of class 7, and there are 2 classes, counted from 0',
    ),
    labels(
        'classes counted from 1', lambda label, index: label + 1, r'has a pixel of class 2, and there are 2 classes'
    ),
    labels(
        'colour masks',
        lambda label, index: cv2.cvtColor(label * 255, cv2.COLOR_GRAY2BGR),
        r'has 3 channels; a label map has one',
    ),
    labels(
        'masks with transparency',
        lambda label, index: cv2.cvtColor(label * 255, cv2.COLOR_GRAY2BGRA),
        r'has 4 channels; a label map has one',
    ),
    labels(
        '16 bits',
        lambda label, index: label.astype(np.uint16) * 256,
        r'has the value 256, of which mmseg reads the lowest 8 bits',
    ),
    labels('another size', lambda label, index: label[:-4], r'000.png is 64x44, and its image .*000.png 64x48'),
    labels('turned', lambda label, index: label.T.copy(), r'000.png is 48x64, and its image .* 64x48'),
    labels(
        'one map missing in the middle',
        only(3, lambda label: None),
        r'labels/003.png does not exist, the label map of 003.png',
    ),
    labels(
        'the last map missing', only(5, lambda label: None), r'labels/005.png does not exist, the label map of 005.png'
    ),
    labels('all maps missing', lambda label, index: None, r'000.png does not exist, nor do 5 others'),
    labels('the last map of another size', only(5, lambda label: label[:, 2:]), r'005.png is 62x48, and its image'),
    files(
        'no images',
        lambda folder: [path.unlink() for path in (folder / 'images').iterdir()],
        r"has no file that ends with '.png'",
    ),
    files(
        'a map that is empty',
        lambda folder: (folder / 'labels/000.png').write_bytes(b''),
        r'labels/000.png cannot be read as an image',
    ),
    files(
        'a map that is text',
        lambda folder: (folder / 'labels/000.png').write_text('0 0 1'),
        r'labels/000.png cannot be read as an image',
    ),
    files(
        'an image that is empty',
        lambda folder: (folder / 'images/000.png').write_bytes(b''),
        r'images/000.png cannot be read as an image',
    ),
    files(
        'an image that is text',
        lambda folder: (folder / 'images/000.png').write_text('x'),
        r'images/000.png cannot be read as an image',
    ),
    Case(
        'a validation of other classes',
        r'val_dataloader.dataset: class 1 is .nucleus., and .cell. in train_dataloader.dataset; give both the same',
        "val_dataloader = dict(dataset=dict(metainfo=dict(classes=('background', 'nucleus'))))",
        base='masks.py',
    ),
    Case(
        'a validation with fewer classes',
        r'val_dataloader.dataset',
        "val_dataloader = dict(dataset=dict(metainfo=dict(classes=('background',), palette=[[0, 0, 0]])))",
        base='masks.py',
    ),
    Case(
        'a validation in another order',
        r'the same classes have to be in the same order',
        "val_dataloader = dict(dataset=dict(metainfo=dict(classes=('cell', 'background'))))",
        base='masks.py',
    ),
    Case(
        'a validation without classes',
        r'val_dataloader.dataset: BaseSegDataset has no classes',
        'val_dataloader = dict(dataset=dict(metainfo=dict(_delete_=True)))',
        base='masks.py',
    ),
    Case(
        'a metric of the other task',
        r"val_evaluator.type='CocoMetric': there is no such metric in mmseg",
        "val_evaluator = dict(_delete_=True, type='CocoMetric')",
        base='masks.py',
    ),
    Case(
        'a metric with a typo',
        r"val_evaluator.type='IoUMetrics': .*'IoUMetric'",
        "val_evaluator = dict(type='IoUMetrics')",
        base='masks.py',
    ),
    Case(
        'an option of the metric with a typo',
        r"IoUMetric has no option 'iou_metric'; .*'iou_metrics'",
        "val_evaluator = dict(iou_metric=['mIoU'])",
        base='masks.py',
    ),
    # what is right
    labels(
        'a class that is in one map alone',
        lambda label, index: label if index == 2 else label * 255,
        Accepted('more maps are opened'),
    ),
    labels(
        'ignored pixels',
        lambda label, index: np.where(label == 0, 255, label).astype(np.uint8),
        Accepted('255 is ignored'),
    ),
    files(
        'more label maps than images',
        lambda folder: cv2.imwrite(str(folder / 'labels/extra.png'), np.zeros((4, 4), np.uint8)),
        Accepted('mmseg goes by the images'),
    ),
    files(
        'files of a Mac',
        lambda folder: (folder / 'images/._000.png').write_bytes(b'x'),
        Accepted('mmengine passes over hidden files'),
    ),
    data('no colours', 'metainfo=dict(palette=[])', Accepted('mmseg chooses some')),
    data(
        'a list of names',
        "ann_file='train.txt'",
        Accepted('as mmseg documents it'),
        files=lambda place: (place / 'masks/train.txt').write_text('000\n001\n002\n003\n'),
    ),
]
