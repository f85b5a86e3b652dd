import json

import cv2
import numpy as np
import pytest
from mmdet.registry import DATASETS

from mmkd.data import shapes
from mmkd.errors import ConfigError


@pytest.fixture
def root(tmp_path):
    return shapes.generate(tmp_path / 'shapes', size=96, splits={'train': 12, 'val': 4})


def test_the_same_arguments_give_the_same_images(root, tmp_path):
    again = shapes.generate(tmp_path / 'again', size=96, splits={'train': 12, 'val': 4})
    for path in sorted(root.rglob('*.*')):
        assert path.read_bytes() == (again / path.relative_to(root)).read_bytes()
    other = shapes.generate(tmp_path / 'other', size=96, splits={'train': 12, 'val': 4}, seed=1)
    assert (other / 'train/000000.jpg').read_bytes() != (root / 'train/000000.jpg').read_bytes()


def test_more_images_leave_the_first_as_they_are(root, tmp_path):
    more = shapes.generate(tmp_path / 'more', size=96, splits={'train': 14, 'val': 4})
    assert (more / 'train/000011.jpg').read_bytes() == (root / 'train/000011.jpg').read_bytes()


def test_data_that_is_there_is_kept_and_other_data_not_overwritten(root):
    image = root / 'train/000000.jpg'
    image.write_bytes(b'mine')
    shapes.generate(root, size=96, splits={'train': 12, 'val': 4})
    assert image.read_bytes() == b'mine'
    with pytest.raises(ConfigError, match='made from'):
        shapes.generate(root, size=96, splits={'train': 13, 'val': 4})


def test_the_stock_coco_dataset_reads_it(root):
    dataset = DATASETS.build(
        dict(
            type='CocoDataset',
            data_root=str(root),
            metainfo=dict(classes=shapes.CLASSES),
            ann_file='annotations/train.json',
            data_prefix=dict(img='train/'),
            pipeline=[],
        )
    )
    assert len(dataset) == 12
    instances = [each for index in range(12) for each in dataset.get_data_info(index)['instances']]
    assert all(0 <= each['bbox_label'] < 6 for each in instances)


def test_boxes_are_inside_the_image_and_hold_the_area():
    found = 0
    for seed in range(30):
        image, objects = shapes.draw(np.random.default_rng(seed), 96, 1)
        assert image.shape == (96, 96, 3)
        assert image.dtype == np.uint8
        for label, (x, y, width, height), area in objects:
            found += 1
            assert 0 <= label < 6
            assert 0 <= x < x + width <= 96
            assert 0 <= y < y + height <= 96
            assert 12 <= area <= width * height
    assert found > 20


@pytest.mark.parametrize('shape', shapes.CLASSES)
def test_each_shape_covers_what_its_geometry_says(shape):
    radius = 150.0  # large: OpenCV fills the pixels on the outline too
    coverage = shapes.coverage_of(shape, np.array([240.0, 240.0]), radius, 0.0, 480)
    arm = 0.33
    star = 5 * 0.42 * np.sin(np.pi / 5)
    expected = {
        'circle': np.pi,
        'ring': np.pi * (1 - 0.55**2),
        'square': 2.0,
        'triangle': 3 * np.sqrt(3) / 4,
        'star': star,
        'cross': 4 * (2 * arm) - (2 * arm) ** 2,
    }[shape]
    assert coverage.sum() == pytest.approx(expected * radius**2, rel=0.03)


def test_images_are_real_jpegs_with_the_annotated_size(root):
    content = json.loads((root / 'annotations/val.json').read_text())
    for image in content['images']:
        assert cv2.imread(str(root / 'val' / image['file_name'])).shape == (image['height'], image['width'], 3)
