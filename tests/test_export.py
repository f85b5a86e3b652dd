"""tools/export.py: what stock mmdet and mmseg make of a student, in a process that cannot import mmkd."""

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner
from tool import tool

from mmkd.hosts.plain import plain_config
from mmkd.testing import models, segmentors
from mmkd.testing.runs import distilled, shapes_config, streets_config

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
WITHOUT_MMKD = """
import sys
class NoMmkd:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] == 'mmkd':
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, NoMmkd())
"""


def stock(script):
    """Run a script where mmkd cannot be imported; what it printed."""
    done = subprocess.run([sys.executable, '-c', WITHOUT_MMKD + script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def export(config, tmp_path):
    """Train for an iteration, and export; the exported config."""
    config.train_cfg.max_iters = 1
    config.default_hooks.checkpoint.interval = 1
    config.dump(tmp_path / 'config.py')
    Runner.from_cfg(config).train()
    tool('export', tmp_path / 'config.py', tmp_path / 'work' / 'iter_1.pth', tmp_path / 'plain')
    text = (tmp_path / 'plain.py').read_text()
    assert 'mmkd' not in text
    assert 'distillers' not in text
    return Config.fromfile(tmp_path / 'plain.py')


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / 'picture.png'
    cv2.imwrite(str(path), np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8))
    return str(path)


def test_stock_mmdet_shows_the_datas_own_classes(tmp_path, picture):
    config = shapes_config(tmp_path, distilled(tmp_path, dict(gid=dict(type='GID'))))
    names = config.train_dataloader.dataset.metainfo.classes
    config.optim_wrapper.paramwise_cfg = dict(
        custom_keys={'gid.adapters': dict(lr_mult=2), 'backbone': dict(lr_mult=0.1)}
    )
    plain = export(config, tmp_path)
    assert plain.optim_wrapper.paramwise_cfg == dict(custom_keys=dict(backbone=dict(lr_mult=0.1)))
    stock(f"""
from mmdet.apis import DetInferencer, init_detector, inference_detector
config, weights, picture = {str(tmp_path / 'plain.py')!r}, {str(tmp_path / 'plain.pth')!r}, {picture!r}
names = {tuple(names)!r}
model = init_detector(config, weights, device='cpu')
assert tuple(model.dataset_meta['classes']) == names
assert type(model).__name__ == 'RetinaNet'
inference_detector(model, picture)
inferencer = DetInferencer(config, weights, device='cpu')
assert tuple(inferencer.visualizer.dataset_meta['classes']) == names
inferencer(picture, out_dir={str(tmp_path / 'drawn')!r}, pred_score_thr=0.0)
""")
    assert list((tmp_path / 'drawn').rglob('picture.png'))


def test_stock_mmseg_shows_the_datas_own_classes_and_trains_on_its_labelled_domain(tmp_path, picture):
    student = segmentors.pspnet(classes=3)
    model = distilled(
        tmp_path, dict(dakd=dict(type='DAKD', critic_channels=4)), student, segmentors.pspnet(classes=3, channels=24)
    )
    config = streets_config(tmp_path, model, two_domains=True)
    names, colors = ('road', 'sidewalk', 'building'), [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    loaders = [config.val_dataloader, config.test_dataloader]
    for dataset in (*config.train_dataloader.dataset.datasets, *(loader.dataset for loader in loaders)):
        dataset.metainfo = dict(classes=names, palette=colors)
    config.visualizer = dict(type='SegLocalVisualizer', name='visualizer', vis_backends=[dict(type='LocalVisBackend')])
    config.optim_wrapper.paramwise_cfg = dict(custom_keys={'dakd.critics': dict(lr_mult=0.1)})
    config.test_pipeline = config.test_dataloader.dataset.pipeline  # which mmseg's inference_model reads
    config.target = config.train_dataloader.dataset.datasets[1]  # a variable, as configs have them
    plain = export(config, tmp_path)
    assert 'paramwise_cfg' not in plain.optim_wrapper
    assert plain.train_dataloader.sampler == dict(type='InfiniteSampler', shuffle=True)
    assert plain.train_dataloader.dataset.data_prefix == config.train_dataloader.dataset.datasets[0].data_prefix
    assert 'domain' not in plain.train_dataloader.dataset.pipeline[-1].meta_keys
    stock(f"""
import torch
from mmengine.config import Config
from mmengine.runner import Runner
from mmseg.apis import MMSegInferencer, inference_model, init_model
config, weights, picture = {str(tmp_path / 'plain.py')!r}, {str(tmp_path / 'plain.pth')!r}, {picture!r}
names, colors = {names!r}, {colors!r}
model = init_model(config, weights, device='cpu')
assert tuple(model.dataset_meta['classes']) == names and model.dataset_meta['palette'] == colors
inference_model(model, picture)
inferencer = MMSegInferencer(config, weights, classes=model.dataset_meta['classes'],
                             palette=model.dataset_meta['palette'], device='cpu')
assert tuple(inferencer.model.dataset_meta['classes']) == names
assert tuple(inferencer.visualizer.dataset_meta['classes']) == names
inferencer(picture, out_dir={str(tmp_path / 'drawn')!r})
settings = Config.fromfile(config)
settings.work_dir = {str(tmp_path / 'stock')!r}
runner = Runner.from_cfg(settings)
runner.train()
assert runner.iter == 1
""")
    assert list((tmp_path / 'drawn').rglob('*.png'))


def test_names_and_colors_come_from_the_config_where_the_checkpoint_has_weights_alone(tmp_path):
    config = shapes_config(tmp_path, distilled(tmp_path, dict(gid=dict(type='GID'))))
    config.dump(tmp_path / 'config.py')
    models.save_weights(config.model.student, tmp_path / 'weights.pth')
    tool('export', tmp_path / 'config.py', tmp_path / 'weights.pth', tmp_path / 'plain')
    meta = torch.load(tmp_path / 'plain.pth', weights_only=True)['meta']['dataset_meta']
    assert meta['classes'] == tuple(config.train_dataloader.dataset.metainfo.classes)


def test_a_missing_checkpoint_is_not_called_a_teachers(tmp_path):
    config = shapes_config(tmp_path, distilled(tmp_path, dict(gid=dict(type='GID'))))
    config.dump(tmp_path / 'config.py')
    printed = tool('export', tmp_path / 'config.py', tmp_path / 'nowhere.pth', tmp_path / 'plain', expect=1)
    (line,) = [line for line in printed.splitlines() if line.startswith('error: ')]
    assert line.startswith(f'error: checkpoint {tmp_path}/nowhere.pth: no such file')
    assert 'teacher' not in line


MODULE = """
from mmengine.registry import HOOKS
from mmengine.hooks import Hook
from mmkd.registry import DISTILLERS

"""
DISTILLER = '@DISTILLERS.register_module()\nclass {name}Distiller:\n    pass\n'
HOOK = '@HOOKS.register_module()\nclass {name}Hook(Hook):\n    pass\n'


@pytest.mark.parametrize(
    ('parts', 'hooked', 'kept'),
    [
        (DISTILLER, False, False),  # only distillers need it
        (DISTILLER + HOOK, False, False),
        (DISTILLER + HOOK, True, True),  # the plain config names its hook
        (HOOK, False, True),  # nothing to do with distillation
        ('', False, True),
    ],
)
def test_imports_that_only_distillers_need_are_left_out(tmp_path, monkeypatch, parts, hooked, kept):
    name = f'imported{abs(hash((parts, hooked)))}'
    (tmp_path / f'{name}.py').write_text(MODULE + parts.format(name=name.title()))
    monkeypatch.syspath_prepend(tmp_path)
    config = shapes_config(tmp_path, distilled(tmp_path, dict(gid=dict(type='GID'))))
    config.custom_imports = dict(imports=[name, 'mmkd', 'json'])
    config.custom_hooks = [dict(type=f'{name.title()}Hook')] if hooked else []
    __import__(name)
    plain, left = plain_config(config, [])
    assert plain.custom_imports.imports == ([name, 'json'] if kept else ['json'])
    assert left == []
    assert config.custom_imports.imports == [name, 'mmkd', 'json']


@pytest.mark.parametrize(
    'name', ['gid_retinanet.py', 'skd_pspnet.py', 'ifvd_pspnet.py', 'dakd_deeplabv3.py', 'streets/dakd_pspnet.py']
)
def test_configs_become_plain(name):
    """Those that train critics, or on two domains."""
    plain, left = plain_config(Config.fromfile(ROOT / 'configs' / name), ['backbone.conv1.weight'])
    assert left == []
    assert 'teacher' not in plain.model
    for word in ('mmkd', 'distillers', 'critic'):
        assert word not in plain.pretty_text
