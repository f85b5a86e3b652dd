"""Every config parses and builds; those of full size are built, and checked, where they take two steps."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

from mmkd.experiments.configs import teachers_of
from mmkd.hosts.datasets import datasets
from mmkd.weights import BESIDE

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1] / 'configs'
CONFIGS = sorted(str(path.relative_to(ROOT)) for path in ROOT.rglob('*.py') if path.parent.name != '_base_')
FULL_SIZE = [name for name in CONFIGS if '/' not in name]
CITYSCAPES = [name for name in FULL_SIZE if 'mmseg::' in (ROOT / name).read_text()]
COCO = [name for name in FULL_SIZE if name not in CITYSCAPES]


def build(model, scope):
    with DefaultScope.overwrite_default_scope(scope):
        return MODELS.build(model)


def check(name, config, model):
    """A config and the model it builds belong to the task that its name says."""
    student = config.model.get('student', config.model)
    assert type(model).__name__.removeprefix('Distilled') == student.type
    segments = name in CITYSCAPES or name.startswith('streets/')
    assert config.default_scope == ('mmseg' if segments else 'mmdet')
    expected = 'CityscapesDataset' if segments else 'CocoDataset'
    for loader in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        assert all(dataset.type in (expected, 'mmkd.Images') for _, dataset in datasets(config[loader].dataset, loader))


@pytest.mark.parametrize('name', [name for name in CONFIGS if name not in FULL_SIZE])
def test_it_parses_and_builds(name):
    config = Config.fromfile(ROOT / name)
    check(name, config, build(config.model, config.default_scope))


def check_full_size(name, model):
    """A model of a full-size config is a plain one beside what is trained for distillation, on the schedule of its host."""
    config = Config.fromfile(ROOT / name)  # anew: mmseg's EncoderDecoder changes what it is built from
    check(name, config, model)
    keys = [key for key in model.state_dict() if not key.startswith(BESIDE)]
    assert keys == list(build(config.model.student, config.default_scope).state_dict())
    if teachers_of(config):
        assert model.sources['teacher'].checkpoint.startswith('https://')
    if name in COCO:
        if name.startswith('pseudo_labels_'):
            assert config.train_cfg.max_iters == 180000
        else:
            assert config.train_cfg.max_epochs in (
                (16,) if name.startswith('labelenc_step1') else (12, 24, 300)
            )  # 300: RTMDet
        assert config.auto_scale_lr.base_batch_size == (256 if name == 'cwd_rtmdet.py' else 16)
    else:
        assert config.train_cfg.max_iters in (80000, 160000)
        assert config.auto_scale_lr.base_batch_size == 8
        networks = [model, *(source.model for source in model.sources.values())]
        assert {each.decode_head.num_classes for each in networks} == {19}
    if name in ('gid_retinanet.py', 'cwd_retinanet.py'):  # nothing is trained beside the student
        assert not list(model.distillers.parameters())


@pytest.mark.parametrize('name', FULL_SIZE)
def test_a_full_size_config_is_short(name):
    lines = [line for line in (ROOT / name).read_text().splitlines() if line.strip()]
    assert len(lines) <= (50 if name.startswith(('dakd', 'pseudo_labels')) else 20)  # with data sets of two kinds


def test_mmkd_bases_resolve_from_another_folder(tmp_path):
    child = tmp_path / 'child.py'
    child.write_text("_base_ = 'mmkd::gid_retinanet.py'\nmodel = dict(student=dict(bbox_head=dict(num_classes=3)))\n")
    script = f"""
import mmkd
from mmengine.config import Config

config = Config.fromfile({str(child)!r})
assert config.model.student.bbox_head.num_classes == 3
assert config.model.distillers.gid.type == 'GID'
assert Config.fromfile(mmkd.hosts.mmengine.config_path('mmkd::shapes/gid_retinanet.py')).train_cfg.max_iters > 0
"""
    subprocess.run([sys.executable, '-c', script], cwd=tmp_path, check=True, env={**os.environ, 'PYTHONPATH': ''})


def test_the_headline_command_without_coco_says_what_to_do(tmp_path):
    command = [sys.executable, str(ROOT.parent / 'tools' / 'train.py'), str(ROOT / 'gid_retinanet.py')]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith('error:')]
    assert str(tmp_path / 'data/coco') in line
    assert '--cfg-options train_dataloader.dataset.data_root=' in line
    assert 'make demo' in line


@pytest.mark.parametrize('name', FULL_SIZE)
def test_the_table_of_configs_has_it_with_its_student_and_teacher(name):
    """And does not claim to have run it."""
    (row,) = [line for line in (ROOT / 'README.md').read_text().splitlines() if f']({name})' in line]
    assert row.rstrip(' |').endswith('not run')
    config = Config.fromfile(ROOT / name)
    backbone = config.model.student.backbone
    others = {'CSPNeXt': 'tiny', 'MobileNetV2': 'MBV2', 'MixVisionTransformer': 'B0'}
    student = f'R{backbone.depth}' if 'depth' in backbone else others[backbone.type]
    pair = row.split('|')[4]
    assert '→' in pair
    assert student in pair.partition('→')[2]
    if not teachers_of(config):
        assert pair.strip().startswith(('no teacher →', 'labels →'))
        return
    (teacher,) = teachers_of(config).values()
    teacher = Path(teacher['config'].partition('::')[2]).stem.split('_')[1]
    assert teacher.removeprefix('mit-').partition('-')[0].upper() in pair.partition('→')[0].upper()
