"""The demo's book-keeping; the demo itself is run by `make demo`."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path += [str(Path(__file__).parents[1] / folder) for folder in ('demo', 'tools')]

import report
from detection import DEMO
from runs import Run

from mmkd.errors import ConfigError


def write_run(folder, ap, seed=0, name='student alone', size=4):
    """What a finished run of the shapes student leaves behind."""
    run = Run(name, 'mmkd::shapes/retinanet_student.py', folder, {'randomness.seed': seed})
    log = folder / '20260101_000000' / 'vis_data' / 'scalars.json'
    log.parent.mkdir(parents=True)
    metrics = dict.fromkeys(DEMO.metrics.values(), ap) | {'coco/bbox_mAP_l': -1.0}
    entries = [{'loss': 2.0, 'step': 20}, {'coco/bbox_mAP': 0.01, 'step': 200}, {**metrics, 'step': run.iterations}]
    log.write_text('\n'.join(map(json.dumps, entries)) + '\n')
    weights = {
        'conv.weight': torch.zeros(size),
        'bn.running_mean': torch.zeros(9),
        'distillers.a.weight': torch.zeros(7),
    }
    torch.save({'state_dict': weights}, run.checkpoint)
    return run


def test_the_table_has_means_spread_and_the_share_of_the_gap(tmp_path):
    teacher = write_run(tmp_path / 'teacher', 0.5, name='teacher', size=3000)
    students = {
        'student alone': [write_run(tmp_path / f'a{seed}', ap, seed) for seed, ap in enumerate((0.1, 0.2))],
        'GID': [write_run(tmp_path / f'g{seed}', ap, seed) for seed, ap in enumerate((0.3, 0.35))],
    }
    table = {row['model']: row for row in report.rows(DEMO, teacher, students)}
    assert table['GID']['AP'] == '0.325 ± 0.035'
    assert table['GID']['gap closed'] == '50 %'
    assert table['student alone']['AP by seed'] == '0.100 0.200'
    assert table['teacher']['AP'] == '0.500'
    assert table['teacher']['AP large'] == 'none'
    assert table['teacher']['parameters'] == '3 k'
    assert table['student alone']['gap closed'] == ''


def test_a_finished_run_is_reused_and_an_interrupted_line_skipped(tmp_path, capsys):
    run = write_run(tmp_path / 'run', 0.3)
    log = next((tmp_path / 'run').glob('*/vis_data/scalars.json'))
    with log.open('a') as file:
        file.write('{"loss": 1.0, "ste')
    assert run.finished
    run.train('[1/1]')
    assert 'finished before, reused' in capsys.readouterr().out
    assert [entry['step'] for entry in run.evaluations()] == [200, run.iterations]


def test_work_begun_with_another_config_is_not_mixed_with_it(tmp_path):
    run = write_run(tmp_path / 'run', 0.3)
    run.train('[1/1]')
    run.options['optim_wrapper.optimizer.lr'] = 1.0
    with pytest.raises(ConfigError, match='begun with another version of .*remove'):
        run.train('[1/1]')


def test_a_run_without_its_last_evaluation_is_not_finished(tmp_path):
    run = write_run(tmp_path / 'run', 0.3)
    log = next((tmp_path / 'run').glob('*/vis_data/scalars.json'))
    log.write_text('\n'.join(log.read_text().splitlines()[:-1]) + '\n')
    assert not run.finished
