"""The table and the page of a demo's report, with runs that are made up; the demos themselves are run by `make demo`."""

import json

import pytest
import torch

from mmkd.experiments.demos.detection import DEMO
from mmkd.experiments.runs import Run

REPORT = DEMO.report


def write_run(folder, ap, seed=0, name='student alone', size=4, config='retinanet_student', **losses):
    """What a finished run of a shapes student leaves behind."""
    run = Run(name, f'mmkd::shapes/{config}.py', folder, {'randomness.seed': seed})
    log = folder / '20260101_000000' / 'vis_data' / 'scalars.json'
    log.parent.mkdir(parents=True)
    metrics = dict.fromkeys(REPORT.metrics.values(), ap) | {'coco/bbox_mAP_l': -1.0}
    losses = {'loss_cls': 1.0, 'loss_bbox': 1.0, 'loss': 2.0, **losses}
    entries = [{**losses, 'step': step} for step in (20, 40)]
    entries += [{'coco/bbox_mAP': 0.01, 'step': 200}, {**metrics, 'step': run.length}]
    log.write_text('\n'.join(map(json.dumps, entries)) + '\n')
    weights = {
        'conv.weight': torch.zeros(size),
        'bn.running_mean': torch.zeros(9),
        'distillers.a.weight': torch.zeros(7000),
        'sources.peer.model.weight': torch.zeros(7000),
    }
    torch.save({'state_dict': weights}, run.checkpoint)
    return run


@pytest.fixture
def models(tmp_path):
    """A teacher, and two seeds of two students."""
    teacher = write_run(tmp_path / 'teacher', 0.5, name='teacher', size=3000)
    of_gid = {'config': 'gid_retinanet', 'gid.loss_feature': 3.0}
    return teacher, {
        'student alone': [write_run(tmp_path / f'a{seed}', ap, seed) for seed, ap in enumerate((0.1, 0.2))],
        'GID': [write_run(tmp_path / f'g{seed}', ap, seed, **of_gid) for seed, ap in enumerate((0.3, 0.35))],
    }


def test_the_table_has_means_spread_and_the_share_of_the_gap(models):
    table = {row['model']: row for row in REPORT.rows(*models)}
    assert table['GID']['AP'] == '0.325 ± 0.035'
    assert table['GID']['gap closed'] == '50 %'
    assert table['student alone']['AP by seed'] == '0.100 0.200'
    assert table['teacher']['AP'] == '0.500'
    assert table['teacher']['AP large'] == 'none'
    assert table['teacher']['parameters'] == '3 k'
    assert table['student alone']['gap closed'] == ''


def test_without_a_lead_of_the_teacher_there_is_no_gap(models, tmp_path):
    _, students = models
    teacher = write_run(tmp_path / 'no better', 0.2)
    assert {row['gap closed'] for row in REPORT.rows(teacher, students)} == {''}


def test_the_page_has_the_table_the_curves_and_the_pictures(models, tmp_path):
    more = {'IoU <of> each class': [{'class': 'road', 'teacher': '77.7'}]}
    page = REPORT.write(
        tmp_path / 'report.html', *models, pictures='data:image/png;base64,AAAA', tables=more
    ).read_text()
    assert '<td>0.325 ± 0.035</td>' in page
    assert 'trained for 600 iterations, each student for\n600 iterations, all from random weights' in page
    assert '; 2 seeds, mean and standard deviation.' in page
    assert 'data:image/svg+xml;base64,' in page
    assert 'src="data:image/png;base64,AAAA"' in page
    assert 'IoU &lt;of&gt; each class' in page
    assert '<td>77.7</td>' in page
