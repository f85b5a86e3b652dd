"""Segmentors through mmengine's real Runner and the command-line tools."""

import re
import subprocess
import sys

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from mmseg.apis import inference_model
from tool import tool

from mmkd.testing import models, segmentors
from mmkd.testing.runs import distilled, streets_config

METHODS = dict(
    kd=dict(type='KD'),
    skd=dict(type='SKD'),
    cirkd=dict(
        type='CIRKD', pixel_contrast_size=64, region_contrast_size=64, pixel_memory_size=20, region_memory_size=20
    ),
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A folder with a config, config.py, and what its training left."""
    folder = tmp_path_factory.mktemp('segmentation')
    with DefaultScope.overwrite_default_scope('mmseg'):
        model = distilled(folder, METHODS, segmentors.pspnet(), segmentors.pspnet(24, base=12))
    config = streets_config(folder, model)
    # where mmseg's configs have them: at the top
    config.test_pipeline = config.test_dataloader.dataset.pipeline
    config.data_preprocessor = config.model.student.pop('data_preprocessor')
    config.optim_wrapper.paramwise_cfg = dict(custom_keys={'distillers.skd.critic': dict(lr_mult=0.04)})
    config.dump(folder / 'config.py')
    printed = tool('train', folder / 'config.py')
    # one norm over both networks
    assert 'optim_wrapper.clip_grad takes one norm over the student and the critics of distillers.skd,' in printed
    return folder


def test_the_checkpoint_holds_the_plain_model_and_trained_parts_beside_it(trained):
    state = torch.load(trained / 'work' / 'iter_4.pth', weights_only=True)['state_dict']
    own = [name for name in state if name.startswith('distillers.')]
    assert {'.'.join(name.split('.')[1:3]) for name in own} == {
        'skd.critic',
        'cirkd.projection',
        'cirkd.pixel_queues',
        'cirkd.region_queues',
    }
    assert not any('teacher' in name for name in state)
    plain = models.build(Config.fromfile(trained / 'config.py').model.student)
    assert [name for name in state if name not in own] == list(plain.state_dict())


def test_stock_mmseg_takes_what_export_writes_strictly(trained, tmp_path):
    tool('export', trained / 'config.py', trained / 'work' / 'iter_4.pth', tmp_path / 'plain')
    script = f"""
import sys, torch
from mmseg.apis import inference_model, init_model
from mmengine.runner import load_checkpoint
torch.set_num_threads({torch.get_num_threads()})  # by which sums are rounded; OpenMP bounds it
model = init_model({str(tmp_path / 'plain.py')!r}, device='cpu')
load_checkpoint(model, {str(tmp_path / 'plain.pth')!r}, strict=True)
assert type(model).__name__ == 'EncoderDecoder' and 'mmkd' not in sys.modules
image = next(__import__('pathlib').Path({str(trained)!r}).rglob('*_leftImg8bit.png'))
result = inference_model(model, str(image))
assert tuple(result.pred_sem_seg.data.shape) == (1, 64, 128)
torch.save((str(image), result.seg_logits.data), {str(tmp_path / 'logits.pth')!r})
"""
    done = subprocess.run([sys.executable, '-c', script], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    image, expected = torch.load(tmp_path / 'logits.pth', weights_only=True)
    config = Config.fromfile(trained / 'config.py')
    config.load_from = str(trained / 'work' / 'iter_4.pth')
    runner = Runner.from_cfg(config)
    runner.load_or_resume()
    runner.model.cfg = config
    assert torch.equal(inference_model(runner.model.eval(), image).seg_logits.data, expected)


def test_resuming_brings_back_the_critic_and_the_queues(trained, tmp_path):
    config = Config.fromfile(trained / 'config.py')
    config.resume, config.load_from = True, str(trained / 'work' / 'iter_4.pth')
    config.work_dir = str(tmp_path)
    runner = Runner.from_cfg(config)
    runner.train()  # nothing is left to do
    assert runner.iter == 4
    state = torch.load(trained / 'work' / 'iter_4.pth', weights_only=True)['state_dict']
    assert any(value.abs().sum() > 0 for name, value in state.items() if 'pixel_queue' in name)
    for name, value in runner.model.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_the_test_tool_reports_the_stock_metric(trained, tmp_path):
    printed = tool('test', trained / 'config.py', trained / 'work' / 'iter_4.pth', '--work-dir', tmp_path)
    assert 'mIoU:' in printed


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (
            lambda config, folder: config.train_dataloader.dataset.update(data_root='data/none/'),
            r'data/none/? does not exist.*ln -s /path/to/data data/none.*train_dataloader.dataset.data_root=.*demo-seg',
        ),
        (
            lambda config, folder: config.train_dataloader.dataset.update(img_suffix='.tif'),
            r"leftImg8bit/train has no file that ends with '.tif'; see train_dataloader.dataset.img_suffix",
        ),
        (
            lambda config, folder: config.train_dataloader.dataset.data_prefix.update(seg_map_path='leftImg8bit/train'),
            r'_labelTrainIds.png does not exist, nor do 23 others, the label map of .*dataset_converters/cityscapes.py',
        ),
        (
            lambda config, folder: config.model.student.decode_head.update(num_classes=4),
            r'model.student.decode_head.num_classes=4: train_dataloader.dataset has 19 classes .*give both the same',
        ),
        (
            lambda config, folder: config.model.distillers.update(kd=dict(type='KD', layer='decode_head')),
            r"layer 'decode_head' .* was never called .*tap 'decode_head.conv_seg'",
        ),
        (
            lambda config, folder: config.model.distillers.update(kd=dict(type='DAKD')),
            r'DomainSampler',
        ),
    ],
)
def test_bad_input_is_one_clear_line(trained, tmp_path, change, message):
    config = Config.fromfile(trained / 'config.py')
    change(config, tmp_path)
    config.work_dir = str(tmp_path / 'work')
    config.dump(tmp_path / 'config.py')
    printed = tool('train', tmp_path / 'config.py', expect=1)
    (line,) = [line for line in printed.splitlines() if line.startswith('error:')]
    assert re.search(message, line), line
    assert 'Traceback' not in printed
