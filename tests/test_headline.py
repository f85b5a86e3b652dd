"""The commands of README, with nothing but what a user has: data, and weights in torch's cache."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from mmengine.registry import MODELS, DefaultScope

from mmkd.data import streets
from mmkd.hosts.configs import read_teacher
from mmkd.testing import coco

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
ALL = ['train_dataloader', 'val_dataloader']
COMMON = [f'{loader}.{option}' for loader in ALL for option in ('num_workers=0', 'persistent_workers=False')]
DETECTION = [
    *COMMON,
    'train_cfg.max_epochs=1',
    'train_dataloader.dataset.pipeline.2.scale=(64,64)',
    'val_dataloader.dataset.pipeline.1.scale=(64,64)',
    'optim_wrapper.optimizer.lr=0',
]
SEGMENTATION = [
    *COMMON,
    'train_cfg.max_iters=2',
    'train_dataloader.dataset.pipeline.2.scale=(128,64)',
    'train_dataloader.dataset.pipeline.3.crop_size=(64,64)',
    'val_dataloader.dataset.pipeline.1.scale=(128,64)',
    'model.student.data_preprocessor.size=(64,64)',
    'optim_wrapper.optimizer.lr=0',
    'param_scheduler.0.eta_min=0',
]


def train(folder, name, options, expect=0):
    """Train with the config's own paths, relative to ``folder``, and no way to download anything."""
    nowhere = 'http://127.0.0.1:9'
    environment = dict(
        os.environ, TORCH_HOME=str(folder / 'torch'), OMP_NUM_THREADS='2', http_proxy=nowhere, https_proxy=nowhere
    )
    command = [sys.executable, '-W', 'ignore', str(ROOT / 'tools' / 'train.py'), str(ROOT / 'configs' / name)]
    command.append('--no-check')  # the teachers have random weights
    command += ['--work-dir', 'work', *(['--cfg-options', *options] if options else [])]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    printed = done.stdout + done.stderr
    assert done.returncode == expect, printed[-3000:]
    return printed


def refused(folder, name, message):
    """The one line that a training ends with before data are read or models built."""
    printed = train(folder, name, [], expect=1)
    (line,) = printed.strip().splitlines()
    assert re.fullmatch(f'error: {message}', line), line


def put_teacher(cache, teacher, scope):
    """Put a teacher's weights where the download of its name would be."""
    config = read_teacher(teacher)
    with DefaultScope.overwrite_default_scope(scope):
        model = MODELS.build(config.model)
    torch.save(dict(state_dict=model.state_dict()), cache / Path(config.checkpoint).name)


def test_a_detector_with_weights_of_torchvision(tmp_path):
    coco.generate(tmp_path / 'data' / 'coco', sizes=((64, 64),))
    cache = tmp_path / 'torch' / 'hub' / 'checkpoints'
    start = cache / 'resnet50-0676ba61.pth'
    refused(
        tmp_path,
        'gid_retinanet.py',
        r'model.student.backbone.init_cfg torchvision://resnet50: could not be downloaded from https://download.pytorch.org/'
        rf'\S+ .*; put the file at {start}, or start without: --cfg-options model.student.backbone.init_cfg=None; .*make demo.*',
    )
    torch.save(torchvision.models.resnet50().state_dict(), start)
    refused(
        tmp_path,
        'gid_retinanet.py',
        r'teacher checkpoint https://download.openmmlab.com/\S+: could not be downloaded .*; put the file at '
        rf'{cache}/retinanet_r101_fpn_2x_coco_\S+.pth, .*make demo',
    )
    put_teacher(cache, 'mmdet::retinanet/retinanet_r101_fpn_2x_coco.py', 'mmdet')
    printed = train(tmp_path, 'gid_retinanet.py', DETECTION)
    assert re.search(r'Epoch\(val\) +\[1\]\[4/4\]', printed)
    trained = torch.load(tmp_path / 'work' / 'epoch_1.pth', weights_only=True)['state_dict']
    weights = torch.load(start, weights_only=True)
    assert torch.equal(trained['backbone.layer4.2.conv3.weight'], weights['layer4.2.conv3.weight'])


def test_a_segmentor_with_weights_of_open_mmlab(tmp_path):
    streets.generate(tmp_path / 'data' / 'cityscapes', {'train': 4, 'val': 2}, (64, 128))
    cache = tmp_path / 'torch' / 'hub' / 'checkpoints'
    start = cache / 'resnet18_v1c-b5776b93.pth'
    refused(
        tmp_path,
        'skd_pspnet.py',
        r'model.student.pretrained open-mmlab://resnet18_v1c: could not be downloaded from https://download.openmmlab.com/'
        rf'\S+ .*; put the file at {start}, or start without: --cfg-options model.student.pretrained=None; .*',
    )
    with DefaultScope.overwrite_default_scope('mmseg'):
        backbone = MODELS.build(dict(type='ResNetV1c', depth=18))
    torch.save(backbone.state_dict(), start)
    put_teacher(cache, 'mmseg::pspnet/pspnet_r101-d8_4xb2-80k_cityscapes-512x1024.py', 'mmseg')
    printed = train(tmp_path, 'skd_pspnet.py', SEGMENTATION)
    assert 'mIoU' in printed
    trained = torch.load(tmp_path / 'work' / 'iter_2.pth', weights_only=True)['state_dict']
    assert torch.equal(trained['backbone.layer4.1.conv2.weight'], backbone.state_dict()['layer4.1.conv2.weight'])
