import functools
import os

import mmengine.config.utils
import pytest
import torch
from mmengine.registry import DefaultScope

from mmkd.testing import detectors, models

if 'PYTEST_XDIST_WORKER' in os.environ:  # one of several processes that share the cores
    threads = os.environ.setdefault('OMP_NUM_THREADS', '1')  # also of what tests start
    torch.set_num_threads(int(threads))

# mmengine reads all metafiles of mmdet or mmseg anew for every 'mmdet::...' that a config names
mmengine.config.utils.load = functools.cache(mmengine.config.utils.load)


def pytest_addoption(parser):
    parser.addoption('--full-size', action='store_true', help='configs are tried with images of their own size')
    parser.addoption('--kills', type=int, default=3, help='how often the trainings of tests/test_kills.py are killed')


@pytest.fixture(scope='session')
def full_size(request) -> bool:
    return request.config.getoption('--full-size')


@pytest.fixture(scope='session')
def kills(request) -> int:
    return request.config.getoption('--kills')


@pytest.fixture(autouse=True)
def _reproducible():
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmdet'):
        yield


@pytest.fixture(scope='session')
def teacher_options(tmp_path_factory) -> dict:
    """A small RetinaNet teacher, wider than the default student, with a checkpoint."""
    config = detectors.retinanet(channels=24, base=12)
    checkpoint = models.save_weights(config, tmp_path_factory.mktemp('teacher') / 'teacher.pth')
    return dict(config=config, checkpoint=checkpoint)
