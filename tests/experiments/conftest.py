"""Runs that are made up, or trained by a stand-in."""

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mmkd.commands.compare import main
from mmkd.experiments import runs
from mmkd.experiments.comparison import Comparison
from mmkd.experiments.discovery import Method
from mmkd.experiments.runs import Run
from mmkd.experiments.suites import SUITES
from mmkd.hosts.mmengine import CONFIG_ROOT

ROOT = Path(__file__).parents[2]
SHAPES = SUITES['shapes']

# Instead of `mmkd train`: leaves what a finished training leaves, and notes how it was called.
STAND_IN = """
import json, os, pathlib, sys, time
folder = pathlib.Path(sys.argv[sys.argv.index('--work-dir') + 1])
call = {'folder': folder.name, 'arguments': sys.argv[1:], 'threads': os.environ.get('OMP_NUM_THREADS')}
notes = pathlib.Path(__file__).with_name('notes')
with notes.open('a') as file:
    file.write(json.dumps(call) + chr(10))
if os.environ.get('FAIL', '?') in folder.name:
    sys.exit('ValueError: made to fail')
while len(notes.read_text().splitlines()) < int(os.environ.get('TOGETHER', 0)):
    time.sleep(0.01)
time.sleep(float(os.environ.get('SLEEP', 0)))
iterations = 1500 if 'teacher' in folder.name else 600
log = folder / '20260101_000000' / 'vis_data' / 'scalars.json'
log.parent.mkdir(parents=True)
log.write_text(json.dumps({'coco/bbox_mAP': 0.2, 'time': 0.1, 'step': iterations}))
(folder / f'iter_{iterations}.pth').touch()
"""


@pytest.fixture
def notes(tmp_path, monkeypatch) -> Callable[[], list[dict]]:
    """Puts the stand-in in the place of the training tool; what it was called with, as a function."""
    script = tmp_path / 'train.py'
    script.write_text(STAND_IN)
    monkeypatch.setattr(runs, 'TRAIN', (sys.executable, str(script)))
    monkeypatch.setitem(SUITES, 'shapes', dataclasses.replace(SHAPES, generate=lambda: 'nothing'))

    def read() -> list[dict]:
        path = tmp_path / 'notes'
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

    return read


@pytest.fixture
def configs(tmp_path):
    """A copy of configs/shapes with one method, whose teacher is the one beside it."""
    folder = tmp_path / 'own'
    folder.mkdir()
    shutil.copytree(CONFIG_ROOT / 'shapes' / '_base_', folder / '_base_')
    for name in ('retinanet_student', 'retinanet_teacher', 'gid_retinanet'):
        text = (CONFIG_ROOT / 'shapes' / f'{name}.py').read_text()
        (folder / f'{name}.py').write_text(text.replace('mmkd::shapes/', ''))
    return folder


def _finish(run: Run, ap: float, times=(0.1,) * 30) -> None:
    log = run.folder / '20260101_000000' / 'vis_data' / 'scalars.json'
    log.parent.mkdir(parents=True)
    entries = [{'loss': 1.0, 'time': each, 'step': 20 * (index + 1)} for index, each in enumerate(times)]
    entries += [{SHAPES.score.key: 0.01, 'time': 9.0, 'step': 200}]
    entries += [{SHAPES.score.key: ap, 'time': 9.0, 'step': run.length}]
    log.write_text('\n'.join(map(json.dumps, entries)) + '\n')
    run.checkpoint.touch()


@pytest.fixture
def finish() -> Callable:
    """Leaves what a finished run leaves: a time every 20 iterations, evaluations, a checkpoint."""
    return _finish


@pytest.fixture
def fabricate() -> Callable[..., Comparison]:
    """Makes a finished comparison: teacher 0.38; alone 0.10, 0.14; GID 0.20, 0.30; CWD as alone."""

    def made(folder, methods, seeds=(0, 1)) -> Comparison:
        comparison = Comparison(SHAPES, methods, seeds, folder)
        for run in comparison.teachers.values():
            _finish(run, 0.38)
        aps = {'gid': (0.2, 0.3)}
        for name, of_seed in comparison.runs.items():
            for run, ap in zip(of_seed.values(), aps.get(name.partition('_')[0], (0.1, 0.14))):
                _finish(run, ap)
        return comparison

    return made


@pytest.fixture
def gid() -> Method:
    return Method('gid_retinanet', 'retinanet_student', {'model.teacher': 'retinanet_teacher'})


@pytest.fixture
def cwd() -> Method:
    return Method('cwd_retinanet', 'retinanet_student', {'model.teacher': 'retinanet_teacher'})


@pytest.fixture
def compare(monkeypatch) -> Callable[..., None]:
    """``mmkd compare``, called with arguments as in a shell."""

    def call(*arguments) -> None:
        monkeypatch.setattr(sys, 'argv', ['mmkd compare', *map(str, arguments)])
        main()

    return call
