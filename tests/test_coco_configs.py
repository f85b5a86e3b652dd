"""Every config on COCO takes two training steps with its full-size models, of random weights, on generated images."""

import pytest
from mmengine.config import Config
from test_configs import COCO, ROOT

from mmkd.hosts.datasets import datasets
from mmkd.testing.coco import generate
from mmkd.testing.runs import check_steps, two_steps

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def coco(tmp_path_factory):
    return generate(tmp_path_factory.mktemp('coco') / 'coco')


@pytest.mark.parametrize('name', COCO)
def test_two_training_steps(name, coco, tmp_path, full_size):
    """At 200x333 instead of 800x1333 pixels, for time; nothing else of the models and the pipeline is changed."""
    config = Config.fromfile(ROOT / name)
    for _, dataset in datasets(config.train_dataloader.dataset, 'train_dataloader.dataset'):
        dataset.data_root = coco
        dataset.filter_cfg = dict(filter_empty_gt=False)
        for step in dataset.pipeline:
            if step.type in ('Resize', 'RandomChoiceResize', 'RandomResize') and not full_size:
                step.pop('scales', None)
                step.update(type='Resize', scale=(333, 200), keep_ratio=True)
    check_steps(two_steps(config, tmp_path), config)
