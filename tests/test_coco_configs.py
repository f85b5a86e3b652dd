"""Every config on COCO takes two training steps with its full-size models, of random weights, on generated images."""

import pytest
from mmengine.config import Config
from test_configs import COCO, ROOT, check_full_size

from mmkd.hosts.datasets import datasets
from mmkd.testing.coco import generate
from mmkd.testing.runs import check_steps, two_steps

pytestmark = pytest.mark.long


@pytest.fixture(scope='module')
def coco(tmp_path_factory):
    return generate(tmp_path_factory.mktemp('coco') / 'coco')


@pytest.mark.parametrize('name', COCO)
def test_two_training_steps(name, coco, tmp_path, full_size):
    """At 100x167 instead of 800x1333 pixels, for time; nothing else of the models and the pipeline is changed."""
    config = Config.fromfile(ROOT / name)
    for _, dataset in datasets(config.train_dataloader.dataset, 'train_dataloader.dataset'):
        dataset.data_root = coco
        dataset.filter_cfg = dict(filter_empty_gt=False)
        for step in dataset.pipeline:
            if step.type in ('Resize', 'RandomChoiceResize', 'RandomResize') and not full_size:
                step.pop('scales', None), step.pop('ratio_range', None)
                step.update(type='Resize', scale=(167, 100), keep_ratio=True)
    model, steps = two_steps(config, tmp_path)
    check_steps(steps, config)
    check_full_size(name, model)
