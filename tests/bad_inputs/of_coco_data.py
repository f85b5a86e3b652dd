"""COCO annotation files, images, classes and evaluators."""

import json
from pathlib import Path

import cv2
from table import Accepted, Case, coco


def train(name: str, options: str, expected, **more) -> Case:
    return Case(name, expected, f'train_dataloader = dict(dataset=dict({options}))', **more)


def file(name: str, change, expected, split: str = 'train', **more) -> Case:
    """A changed annotation file."""
    return Case(name, expected, files=coco(change, split), **more)


def every(kind: str, **values):
    """Set entries of all images, annotations or categories; a function is given the entry."""

    def change(content: dict) -> None:
        for each in content[kind]:
            each.update({key: value(each) if callable(value) else value for key, value in values.items()})

    return change


def first(kind: str, **values):
    """Set entries of the first; ``...`` removes one."""

    def change(content: dict) -> None:
        for key, value in values.items():
            if value is ...:
                del content[kind][0][key]
            else:
                content[kind][0][key] = value

    return change


def corners(each: dict) -> list:
    x, y, width, height = each['bbox']
    return [x, y, x + width, y + height]


def twice(kind: str):
    def change(content: dict) -> None:
        content[kind].append(dict(content[kind][0]))

    return change


def image(change):
    """A change of the training images, of which this case has its own."""

    def write(place: Path) -> None:
        folder = place / 'data' / 'train'
        images = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
        folder.unlink()
        folder.mkdir()
        for name, content in images.items():
            (folder / name).write_bytes(content)
        change(folder)

    return write


def small(folder: Path) -> None:
    path = str(folder / '000000.jpg')
    cv2.imwrite(path, cv2.imread(path)[:50])


def few(place: Path) -> None:
    content = json.loads((place / 'data/annotations/val.json').read_text())
    content.update(images=content['images'][:2], annotations=[])
    (place / 'data/annotations/few.json').write_text(json.dumps(content))


FILE = r'train_dataloader.dataset.ann_file: data/annotations/train.json'
LABELS = ('circle', 'square', 'triangle', 'star', 'ring', 'cross')

CASES = [
    train(
        'a root with a typo', "data_root='dta'", r'train_dataloader.dataset.data_root: .*/dta does not exist; .*ln -s'
    ),
    train(
        'an annotation file with a typo',
        "ann_file='annotations/trian.json'",
        r'train_dataloader.dataset.ann_file: .*trian.json does not exist',
    ),
    train('an annotation file that is a folder', "ann_file='annotations'", r'ann_file: data/annotations is no file'),
    train('no annotation file', "ann_file=''", r'ann_file: missing; CocoDataset reads its annotations from it'),
    train(
        'an image folder with a typo', "data_prefix=dict(img='trian/')", r'data_prefix.img: .*/trian/? does not exist'
    ),
    train(
        'the image folder of another split',
        "data_prefix=dict(img='annotations/')",
        r"lists '000000.jpg', which is not in .*/annotations.*, and 7 others; see train_dataloader.dataset.data_prefix.img",
    ),
    train(
        'a prefix that is a string',
        "data_prefix='train/'",
        r"train_dataloader.dataset.data_prefix='train/': expected a dict",
    )._replace(
        text="train_dataloader = dict(dataset=dict(data_prefix=None))\ntrain_dataloader['dataset'] = dict(data_prefix='train/')"
    ),
    train(
        'a class with a typo',
        "metainfo=dict(classes=('circle', 'square', 'triangle', 'star', 'ring', 'cros'))",
        r"has no category 'cros', which train_dataloader.dataset.metainfo.classes names",
    ),
    train(
        'classes without a comma',
        "metainfo=dict(classes=('circle'))",
        r"metainfo.classes='circle': expected a tuple of names",
    ),
    train(
        'classes in another order',
        f'metainfo=dict(classes={LABELS[::-1]})',
        r"is not the order of the categories in .* write classes=\('circle', 'square'",
    ),
    train('classes forgotten', 'metainfo=dict(_delete_=True)', r"has none of COCO's categories; name yours with"),
    train('a class twice', f'metainfo=dict(classes={(*LABELS[:5], "circle")})', r"'circle'.*twice|is not the order"),
    train('a class of COCO alone', "metainfo=dict(classes=('person',))", r"has no category 'person'"),
    file('an empty file', lambda content: '', FILE + ' is empty'),
    file('a file that is cut off', lambda content: '{"images": [{"id": 1, "fi', r'is not a COCO annotation file \('),
    file('an object without anything', lambda content: '{}', r'it lacks images, annotations, categories'),
    file('a list', lambda content: '[]', r'it is no JSON object'),
    file('no JSON', lambda content: 'image,x,y\n', r'is not a COCO annotation file \('),
    file('a byte order mark', lambda content: '\ufeff{}', r'is not a COCO annotation file \(.*BOM'),
    file(
        "labelme's form",
        lambda content: '{"version": "5.0", "shapes": [], "imagePath": "a.jpg"}',
        r'it lacks images, annotations, categories',
    ),
    file(
        'results instead of annotations',
        lambda content: '[{"image_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}]',
        r'it is no JSON object',
    ),
    file('no images', lambda content: content['images'].clear(), FILE + ' lists no images'),
    file('no annotations', lambda content: content['annotations'].clear(), FILE + ' has no box to train on'),
    file('no categories', lambda content: content['categories'].clear(), FILE + ' lists no categories'),
    file('images as a dict', lambda content: content.update(images={}), r'it lacks images'),
    file('an image without an id', first('images', id=...), FILE + ': images, number 0, has no id'),
    file('an image without a name', first('images', file_name=...), FILE + r': images, id=\d+, has no file_name'),
    file('an image without a width', first('images', width=...), r'images, id=\d+, has no width'),
    file('an image without a height', first('images', height=...), r'images, id=\d+, has no height'),
    file(
        'a width that is a string',
        first('images', width='96'),
        r"has file_name='000000.jpg', width='96', height=96; expected",
    ),
    file('a width of 0', every('images', width=0), r'width=0, height=96; expected a name and the size in pixels'),
    file('a name that is None', first('images', file_name=None), r'has file_name=None'),
    file('two images of one id', twice('images'), r'image id=\d+ is there twice; ids have to be unique'),
    file('all images of one id', every('images', id=1), r'image id=1 is there twice'),
    file(
        'an id that is a list',
        first('images', id=[1]),
        r'images, number 0, has id=\[1\]; expected a number or a string',
    ),
    file(
        'a box that is missing',
        first('annotations', bbox=...),
        r'annotation id=\d+ has bbox=None; expected \[x, y, width, height\]',
    ),
    file(
        'a box of strings',
        every('annotations', bbox=['1', '2', '3', '4']),
        r"has bbox=\['1', '2', '3', '4'\]; expected",
    ),
    file('a box of three', first('annotations', bbox=[1, 2, 3]), r'has bbox=\[1, 2, 3\]; expected'),
    file('a box of NaN', first('annotations', bbox=[float('nan'), 2, 3, 4]), r'has bbox=\[nan, 2, 3, 4\]; expected'),
    file(
        'a box that is infinite',
        first('annotations', bbox=[1, 2, float('inf'), 4]),
        r'has bbox=\[1, 2, inf, 4\]; expected',
    ),
    file('a box that is a dict', first('annotations', bbox=dict(x=1)), r"has bbox=\{'x': 1\}; expected"),
    file(
        'boxes as corners',
        every('annotations', bbox=corners),
        r'boxes reach beyond their image, such as bbox=.*; they look like corners',
    ),
    file(
        'boxes as fractions',
        every('annotations', bbox=lambda each: [value / 96 for value in each['bbox']]),
        r'no box reaches beyond 2 pixels, .* not fractions of the image',
    ),
    file(
        'boxes of a larger image',
        every('annotations', bbox=lambda each: [4 * value for value in each['bbox']]),
        r'boxes reach beyond their image',
    ),
    file(
        'boxes without a size',
        every('annotations', bbox=lambda each: [*each['bbox'][:2], 0, 0]),
        r'has no box to train on',
    ),
    file(
        'boxes of a negative size',
        every('annotations', bbox=lambda each: [*each['bbox'][:2], -5, -5]),
        r'has no box to train on',
    ),
    file(
        'no area', every('annotations', area=None), r'annotation id=\d+ has area=None; mmdet expects a number of pixels'
    ),
    file('an area that is missing', first('annotations', area=...), r'has area=None; mmdet expects'),
    file('areas of 0', every('annotations', area=0), r'has no box to train on'),
    file('two annotations of one id', twice('annotations'), r'annotation id=\d+ is there twice'),
    file('an annotation without an id', first('annotations', id=...), r'annotations, number 0, has no id'),
    file('an annotation without an image', first('annotations', image_id=...), r'annotations, id=\d+, has no image_id'),
    file(
        'an annotation without a category',
        first('annotations', category_id=...),
        r'annotations, id=\d+, has no category_id',
    ),
    file(
        'a category that does not exist',
        first('annotations', category_id=99),
        r'has category_id=99, which is none of the categories \(1, 2, 3, 4, 5, ...\)',
    ),
    file(
        'categories counted from 0',
        every('annotations', category_id=lambda each: each['category_id'] - 1),
        r'has category_id=0, which is none of the categories',
    ),
    file(
        'categories by their names',
        every('annotations', category_id='circle'),
        r"has category_id='circle', which is none",
    ),
    file(
        'images by their names',
        every('annotations', image_id='000000.jpg'),
        r"no annotation is of an image of this file; the first has image_id='000000.jpg'",
    ),
    file('a category without a name', first('categories', name=...), r'categories, id=1, has no name'),
    file('a category without an id', first('categories', id=...), r'categories, number 0, has no id'),
    file(
        'another width and height',
        every('images', width=640, height=480),
        r"says 640x480 for '000000.jpg', which is 96x96",
    ),
    file(
        'names with a folder',
        every('images', file_name=lambda each: 'images/' + each['file_name']),
        r"lists 'images/000000.jpg', which is not in",
    ),
    file(
        'names of another machine',
        every('images', file_name=lambda each: 'C:\\data\\' + each['file_name']),
        r'which is not in .*, and 7 others',
    ),
    file(
        'names of another suffix',
        every('images', file_name=lambda each: each['file_name'].replace('.jpg', '.png')),
        r"lists '000000.png', which is not in",
    ),
    file(
        'an image that is not there',
        lambda content: content['images'][3].update(file_name='missing.jpg'),
        r"lists 'missing.jpg', which is not in .*/data/train",
    ),
    file(
        'no segmentation for masks',
        every('annotations', segmentation=[]),
        r'has no segmentation, which with_mask=True of the pipeline asks for',
    )._replace(
        text="train_dataloader = dict(dataset=dict(pipeline=[dict(type='LoadImageFromFile'), "
        "dict(type='LoadAnnotations', with_bbox=True, with_mask=True), dict(type='PackDetInputs')]))"
    ),
    Case(
        'an image that is empty',
        r'000000.jpg cannot be read as an image',
        files=image(lambda folder: (folder / '000000.jpg').write_bytes(b'')),
    ),
    Case(
        'an image that is text',
        r'000000.jpg cannot be read as an image',
        files=image(lambda folder: (folder / '000000.jpg').write_text('no image')),
    ),
    Case(
        'an image that is cut off at once',
        r'000000.jpg cannot be read as an image',
        files=image(lambda folder: (folder / '000000.jpg').write_bytes((folder / '000000.jpg').read_bytes()[:40])),
    ),
    Case('an image of another size', r"says 96x96 for '000000.jpg', which is 96x50", files=image(small)),
    Case(
        'an image that was removed',
        r"lists '000005.jpg', which is not in",
        files=image(lambda folder: (folder / '000005.jpg').unlink()),
    ),
    file(
        'a validation without images',
        lambda content: content['images'].clear(),
        r'val_dataloader.dataset.ann_file: .*val.json lists no images',
        'val',
    ),
    file(
        'a validation with a broken box',
        first('annotations', bbox=[1, 2]),
        r'val_dataloader.dataset.ann_file: .*has bbox=\[1, 2\]',
        'val',
    ),
    Case(
        'a validation of other classes',
        r'val_dataloader.dataset',
        "val_dataloader = dict(dataset=dict(metainfo=dict(classes=('circle', 'square'))))",
    ),
    Case(
        'a validation in another order',
        r'val_dataloader.dataset.metainfo.classes: .* is not the order',
        f'val_dataloader = dict(dataset=dict(metainfo=dict(classes={LABELS[::-1]})))',
    ),
    Case(
        'an evaluator with a typo in its path',
        r'val_evaluator.ann_file: .*vall.json does not exist',
        "val_evaluator = dict(ann_file='data/annotations/vall.json')",
    ),
    Case(
        'an evaluator of the training images',
        r'val_evaluator.ann_file: .*train.json has .* the file of the images that are evaluated; name the same',
        "val_evaluator = dict(ann_file='data/annotations/renamed.json')",
        files=lambda place: (place / 'data/annotations/renamed.json').write_text(
            (place / 'data/annotations/train.json').read_text().replace('00000', '10000')
        ),
    )._replace(
        expected=r"val_evaluator.ann_file: .*renamed.json has '100000.jpg' with id=\d+, which is '000000.jpg' in"
    ),
    Case(
        'an evaluator of fewer images',
        r'val_evaluator.ann_file: .*few.json has no image with id=',
        "val_evaluator = dict(ann_file='data/annotations/few.json')",
        files=few,
    ),
    Case(
        "an evaluator's file that is none",
        r'val_evaluator.ann_file: data/annotations/none.json is empty',
        "val_evaluator = dict(ann_file='data/annotations/none.json')",
        files=lambda place: (place / 'data/annotations/none.json').touch(),
    ),
    # what is right
    file(
        'no iscrowd',
        lambda content: [each.pop('iscrowd', None) for each in content['annotations']] and None,
        Accepted('mmdet takes it for 0'),
    ),
    file(
        'ids that are strings',
        lambda content: (
            (
                every('images', id=lambda each: str(each['id']))(content),
                every('annotations', image_id=lambda each: str(each['image_id']))(content),
            )
            and None
        ),
        Accepted('nothing counts with them'),
    ),
    file(
        'annotations of other images',
        lambda content: content['annotations'].append(dict(content['annotations'][0], id=10**6, image_id=10**6)),
        Accepted('a file may be cut out of a larger one; a warning says so'),
    ),
    file(
        'a box a little too large',
        lambda content: content['annotations'][0].update(bbox=[90, 90, 8, 8], area=64),
        Accepted('some tools draw so'),
    ),
    file(
        'an image without objects',
        lambda content: content.update(
            annotations=[each for each in content['annotations'] if each['image_id'] != content['images'][0]['id']]
        ),
        Accepted('detectors learn from background'),
    ),
    file('more keys', first('images', license=3, coco_url='x'), Accepted('nobody reads them')),
    train('a part of the classes', '', Accepted('only those are learnt'))._replace(
        text="metainfo = dict(classes=('circle', 'square'))\n"
        'train_dataloader = dict(dataset=dict(metainfo=metainfo))\n'
        'val_dataloader = dict(dataset=dict(metainfo=metainfo))\n'
        'test_dataloader = val_dataloader\n'
        'model = dict(student=dict(bbox_head=dict(num_classes=2)))'
    ),
    train('a root without a slash', "data_root='data'", Accepted('mmengine joins paths')),
    train(
        'repeated',
        "_delete_=True, type='RepeatDataset', times=2, dataset=_base_.train_dataloader.dataset",
        Accepted('what is inside is checked'),
    ),
]
