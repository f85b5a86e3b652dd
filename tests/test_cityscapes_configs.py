"""Every config on Cityscapes takes two training steps with its full-size models, of random weights, on generated frames."""

import pytest
from mmengine.config import Config
from test_configs import CITYSCAPES, ROOT, check_full_size

from mmkd.data import streets
from mmkd.hosts.datasets import datasets
from mmkd.testing.runs import check_steps, two_steps

pytestmark = pytest.mark.long


@pytest.fixture(scope='module')
def cityscapes(tmp_path_factory, full_size):
    """Four frames in Cityscapes' layout."""
    size = (1024, 2048) if full_size else (256, 512)
    return streets.generate(tmp_path_factory.mktemp('cityscapes'), {'train': 4}, size)


@pytest.mark.parametrize('name', CITYSCAPES)
def test_two_training_steps(name, cityscapes, tmp_path, full_size):
    """With crops of 128x256 instead of 512x1024, for time; nothing else of the models and the pipeline is changed."""
    config = Config.fromfile(ROOT / name)
    for _, dataset in datasets(config.train_dataloader.dataset, 'train_dataloader.dataset'):
        if dataset.data_root == 'data/gta/':  # labelled images of another data set
            dataset.update(img_suffix='_leftImg8bit.png', seg_map_suffix='_gtFine_labelTrainIds.png')
            dataset.data_prefix = dict(img_path='leftImg8bit/train', seg_map_path='gtFine/train')
        dataset.data_root = str(cityscapes)
        for step in dataset.pipeline:
            if step.type == 'RandomResize' and not full_size:
                step.scale = tuple(side // 4 for side in step.scale)
            if step.type == 'RandomCrop' and not full_size:
                step.crop_size = tuple(side // 4 for side in step.crop_size)
    if not full_size:
        config.model.student.data_preprocessor.size = tuple(
            side // 4 for side in config.model.student.data_preprocessor.size
        )
    model, steps = two_steps(config, tmp_path)
    check_steps(steps, config)
    check_full_size(name, model)
