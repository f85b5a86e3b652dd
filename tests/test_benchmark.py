"""The measuring tool; what it measures is not looked at, but what it writes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from mmengine.config import Config

from mmkd.testing import detectors
from mmkd.testing.runs import distilled

pytestmark = pytest.mark.slow


TOOL = Path(__file__).parents[1] / 'tools' / 'benchmark.py'


def benchmark(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, '-W', 'ignore', str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})


def test_the_figures_are_written_as_they_are_printed(tmp_path):
    model = distilled(tmp_path, dict(cwd=dict(type='CWD', layer='neck')), detectors.retinanet(classes=6))
    config = tmp_path / 'tiny.py'
    Config(dict(model=model, default_scope='mmdet')).dump(config)
    file = tmp_path / 'new folder' / 'figures.json'
    done = benchmark(config, '--shape', 2, 3, 64, 96, '--objects', 2, '--rounds', 1, '--device', 'cpu', '--json', file)
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    assert found['config'] == str(config)
    assert (found['shape'], found['objects'], found['rounds'], found['amp']) == ([2, 3, 64, 96], 2, 1, False)
    assert found['device'].startswith('CPU')
    for name, of_step in found['steps'].items():
        line = f'{name:16}{of_step["median_ms"]:10.1f}{of_step["min_ms"]:10.1f}{of_step["peak_mib"]:12.1f}'
        assert line in done.stdout
        assert 0 < of_step['min_ms'] <= of_step['median_ms']
    steps = found['steps']
    assert list(steps) == ['plain student', 'stock teacher', 'distilled']
    floor = steps['plain student']['median_ms'] + steps['stock teacher']['median_ms']
    assert found['floor_ratio'] == pytest.approx(steps['distilled']['median_ms'] / floor)  # of one round
    assert f'memory ratio     {found["memory_ratio"]:.3f}' in done.stdout
    assert steps['plain student']['peak_mib'] < steps['distilled']['peak_mib']


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (('mmkd::gid_retinanet.py', '--device', 'nonsense'), 'nonsense'),
        (
            ('mmkd::shapes/retinanet_student.py', '--device', 'cpu'),
            'trains a plain model; what is measured is the cost',
        ),
    ],
)
def test_what_cannot_be_measured_is_said_in_one_line(arguments, message):
    done = benchmark(*arguments)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith('error: '), done.stderr
    assert message in last
    assert 'Traceback' not in done.stderr


def test_a_round_is_the_least():
    done = benchmark('mmkd::gid_retinanet.py', '--rounds', 0)
    assert done.returncode == 2
    assert '--rounds: expected at least 1, but got 0' in done.stderr
