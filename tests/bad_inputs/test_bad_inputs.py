"""Wrong inputs as users make them: one line each, before the first iteration, or a reason why it is none."""

import shutil
from pathlib import Path

import cv2
import numpy as np
import of_adapters_and_schedules
import of_checkpoints
import of_coco_data
import of_command_line
import of_config_files
import of_distillers
import of_schemes
import of_segmentation_data
import of_students
import of_teachers
import of_test_and_export
import of_training
import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS
from table import Case, attempt, check

from mmkd.testing import detectors, models, segmentors
from mmkd.testing.runs import distilled, shapes_config, streets_config

TABLES = {
    'command line': of_command_line.CASES,
    'config file': of_config_files.CASES,
    'student': of_students.CASES,
    'teacher': of_teachers.CASES,
    'schemes': of_schemes.CASES,
    'distillers': of_distillers.CASES,
    'adapters and schedules': of_adapters_and_schedules.CASES,
    'training': of_training.CASES,
    'COCO data': of_coco_data.CASES,
    'segmentation data': of_segmentation_data.CASES,
    'checkpoints': of_checkpoints.CASES,
    'test and export': of_test_and_export.CASES,
}
ALL = [pytest.param(case, id=f'{subject}: {case.name}') for subject, rows in TABLES.items() for case in rows]


@pytest.fixture(scope='session')
def made(tmp_path_factory) -> Path:
    """Data, teachers and base configs of both kinds, made once."""
    folder = tmp_path_factory.mktemp('bad_inputs')
    wide = detectors.retinanet(classes=6, channels=24, base=12)
    config = shapes_config(folder, distilled(folder, dict(cwd=dict(type='CWD', layer='neck')), teacher=wide), images=8)
    (folder / 'shapes').rename(folder / 'data')
    _write(config, folder / 'base.py')
    torch.save(_state(config), folder / 'run.pth')
    config.model = config.model.student
    _write(config, folder / 'plain.py')
    _write(Config(dict(model=wide)), folder / 'teacher.py')
    models.save_weights(config.model, folder / 'student.pth')
    _masks(folder / 'masks')
    heads = dict(decode_head=dict(num_classes=2), auxiliary_head=dict(num_classes=2))
    wide = segmentors.pspnet(24, **heads)
    config = streets_config(folder, segmentors.pspnet(**heads), images=2)
    for part in ('train', 'val', 'test'):
        config[f'{part}_dataloader'].dataset = dict(
            type='BaseSegDataset',
            data_root='masks',
            img_suffix='.png',
            metainfo=dict(classes=('background', 'cell'), palette=[[0, 0, 0], [255, 0, 0]]),
            data_prefix=dict(img_path='images', seg_map_path='labels'),
            pipeline=[dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='PackSegInputs')],
        )
    config.model = dict(
        type='mmkd.Distill',
        student=config.model,
        teacher=dict(config=wide, checkpoint=models.save_weights(wide, folder / 'masks_teacher.pth')),
        distillers=dict(kd=dict(type='KD')),
    )
    _write(config, folder / 'masks.py')
    return folder


def _write(config: Config, path: Path) -> None:
    """A config with paths that begin at the current folder."""
    text = config.pretty_text.replace(f'{path.parent}/shapes', 'data').replace(f'{path.parent}/', '')
    path.write_text(text)


def _state(config: Config) -> dict:
    """What a checkpoint of a training holds."""
    model = MODELS.build(config.model)
    optimizer = build_optim_wrapper(model, config.optim_wrapper).optimizer.state_dict()
    meta = dict(epoch=0, iter=4, seed=0)
    return dict(state_dict=model.state_dict(), optimizer=optimizer, message_hub={}, meta=meta)


def _masks(folder: Path) -> None:
    """Images with two classes: a cell, and what is around it."""
    random = np.random.default_rng(0)
    for kind in ('images', 'labels'):
        (folder / kind).mkdir(parents=True)
    for index in range(6):
        label = np.zeros((48, 64), np.uint8)
        label[10 + index : 30, 20:40] = 1
        image = random.integers(0, 100, (48, 64, 3)) + 150 * label[:, :, None]
        cv2.imwrite(str(folder / 'images' / f'{index:03d}.png'), image.clip(0, 255).astype(np.uint8))
        cv2.imwrite(str(folder / 'labels' / f'{index:03d}.png'), label)


@pytest.fixture
def place(made, tmp_path, monkeypatch) -> Path:
    """A folder of its own for a case, which is the current one."""
    for path in made.iterdir():
        if path.is_file():
            (tmp_path / path.name).symlink_to(path)
    shutil.copytree(made / 'masks', tmp_path / 'masks')
    (tmp_path / 'data' / 'annotations').mkdir(parents=True)
    for split in ('train', 'val'):
        (tmp_path / 'data' / split).symlink_to(made / 'data' / split)
        shutil.copy(made / 'data' / 'annotations' / f'{split}.json', tmp_path / 'data' / 'annotations')
    monkeypatch.chdir(tmp_path)
    for name in ('RANK', 'SLURM_PROCID', 'OMPI_COMM_WORLD_LOCAL_RANK'):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.mark.parametrize('case', ALL)
def test_a_bad_input_is_one_clear_line(case: Case, place, capsys, monkeypatch):
    check(case, attempt(case, capsys, monkeypatch))
    assert not (place / of_checkpoints.EXECUTED).exists()


def test_the_tables_have_250_cases():
    assert len(ALL) >= 250


@pytest.mark.parametrize('base', ['base.py', 'plain.py', 'masks.py'])
def test_what_the_cases_are_made_of_is_right(base, place, capsys, monkeypatch):
    """Or they would be refused for something else."""
    assert attempt(Case('right', '', base=base), capsys, monkeypatch) == ''
