"""Every config on COCO takes two training steps with its full-size models, of random weights, on generated images."""

import json

import cv2
import numpy as np
import pytest
from mmdet.datasets import CocoDataset
from mmengine.config import Config
from test_configs import COCO, ROOT

from mmkd.cli import _datasets
from mmkd.testing.runs import check_steps, two_steps

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def coco(tmp_path_factory):
    """Four images of two sizes, the last without objects, in COCO's layout and with its 80 categories."""
    root = tmp_path_factory.mktemp('coco')
    (root / 'train2017').mkdir()
    (root / 'annotations').mkdir()
    random = np.random.default_rng(0)
    images, annotations = [], []
    for index in range(4):
        height, width = [(240, 320), (320, 240)][index % 2]
        name = f'{index:012d}.jpg'
        cv2.imwrite(str(root / 'train2017' / name), random.integers(0, 256, (height, width, 3), dtype=np.uint8))
        images.append(dict(id=index, file_name=name, height=height, width=width))
        for _ in range(0 if index == 3 else 4):
            x, y, w, h = (random.uniform(0.05, 0.45, 4) * [width, height, width, height]).tolist()
            category = int(random.integers(1, 81))
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=index,
                    category_id=category,
                    bbox=[x, y, w, h],
                    area=w * h,
                    iscrowd=0,
                    segmentation=[],
                )
            )
    categories = [dict(id=index + 1, name=name) for index, name in enumerate(CocoDataset.METAINFO['classes'])]
    content = dict(images=images, annotations=annotations, categories=categories)
    (root / 'annotations' / 'instances_train2017.json').write_text(json.dumps(content))
    return str(root) + '/'


@pytest.mark.parametrize('name', COCO)
def test_two_training_steps(name, coco, tmp_path, full_size):
    """At 200x333 instead of 800x1333 pixels, for time; nothing else of the models and the pipeline is changed."""
    config = Config.fromfile(ROOT / name)
    for _, dataset in _datasets(config.train_dataloader.dataset, 'train_dataloader.dataset'):
        dataset.data_root = coco
        dataset.filter_cfg = dict(filter_empty_gt=False)
        for step in dataset.pipeline:
            if step.type in ('Resize', 'RandomChoiceResize', 'RandomResize') and not full_size:
                step.pop('scales', None)
                step.update(type='Resize', scale=(333, 200), keep_ratio=True)
    check_steps(two_steps(config, tmp_path), config)
