"""tools/compare.py on configs and data of one's own: tiny models, through the real Runner."""

import json
import re

import pytest
from mmengine.config import Config

from mmkd.testing import detectors, models, segmentors
from mmkd.testing.runs import shapes_config, streets_config

pytestmark = [pytest.mark.slow, pytest.mark.long]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch, tmp_path):
    """One goes to work in a folder of one's own, and tests do not share the cores."""
    monkeypatch.setattr('os.sched_getaffinity', lambda _: {0})
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow
def test_iterations_with_a_teacher_that_is_trained_first(tmp_path, compare, capsys):
    """Detection: all that a comparison leaves, and that a second call has nothing to do."""
    folder = tmp_path / 'my detectors'
    (folder / '_base_').mkdir(parents=True)
    teacher = detectors.retinanet(classes=6, channels=24, base=12)
    shapes_config(tmp_path / 'data', teacher).dump(folder / '_base_' / 'teacher.py')
    (folder / 'large.py').write_text("_base_ = '_base_/teacher.py'\ntrain_cfg = dict(max_iters=5)\n")
    config = Config.fromfile(folder / '_base_' / 'teacher.py')
    config.model = detectors.retinanet(classes=6)
    config.dump(folder / 'small.py')
    (folder / 'cwd.py').write_text("""
_base_ = 'small.py'
model = dict(
    _delete_=True,
    type='mmkd.Distill',
    student=_base_.model,
    teacher=dict(config='large.py', checkpoint='is/trained/here.pth'),
    distillers=dict(cwd=dict(type='CWD', layer='neck')),
)
""")
    command = [folder, '--seeds', 1, '--work-dir', 'my work']
    compare(*command)
    results = json.loads((tmp_path / 'my work' / 'results.json').read_text())
    assert (results['suite'], results['score']) == ('my detectors', {'key': 'coco/bbox_mAP', 'name': 'AP', 'digits': 3})
    assert (results['failed'], results['missing']) == ({}, {})
    assert 0 <= results['teachers']['large'] <= 1
    method = results['methods']['cwd']
    assert (method['student'], method['teachers']) == ('small', ['large'])
    assert set(method['scores']) == set(results['students']['small']['scores']) == {'1'}
    assert method['gain'] == pytest.approx(method['mean'] - results['students']['small']['mean'])
    assert method['step_time'] > 0
    for name in ('table.md', 'chart.png', 'report.html'):
        assert (tmp_path / 'my work' / name).is_file()
    assert '| cwd | small | large |' in (tmp_path / 'my work' / 'table.md').read_text()
    log = (tmp_path / 'my work' / 'cwd_seed1' / 'output.log').read_text()
    assert re.search('loaded .*my work/large/iter_5.pth', log)
    capsys.readouterr()
    compare(*command)
    assert capsys.readouterr().out.count('finished before, reused') == 3
    assert json.loads((tmp_path / 'my work' / 'results.json').read_text()) == results


@pytest.mark.slow
def test_epochs_with_a_teacher_from_elsewhere(tmp_path, compare):
    """Segmentation: a checkpoint beside the config, hooks that count iterations, a score of one's own choice."""
    folder = tmp_path / 'mine'
    folder.mkdir()
    config = streets_config(tmp_path / 'data', segmentors.pspnet(), images=8)
    config.train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=2)
    config.train_dataloader.sampler = dict(type='DefaultSampler', shuffle=True)
    config.param_scheduler = []
    config.dump(folder / 'alone.py')
    models.save_weights(segmentors.pspnet(base=12), folder / 'teacher.pth')
    config.model = dict(
        type='mmkd.Distill',
        student=segmentors.pspnet(),
        teacher=dict(config=segmentors.pspnet(base=12), checkpoint='teacher.pth'),
        distillers=dict(kd=dict(type='KD')),
    )
    config.dump(folder / 'kd.py')
    compare(folder, '--seeds', 3, '--score', 'aAcc')
    results = json.loads((tmp_path / 'work_dirs' / 'compare_mine' / 'results.json').read_text())
    assert results['score'] == {'key': 'aAcc', 'name': 'aAcc', 'digits': 2}
    assert results['teachers'] == {}
    method = results['methods']['kd']
    assert method['teachers'] == ['EncoderDecoder']
    assert 0 <= method['scores']['3'] <= 100
    assert method['gap_closed'] is None
    assert (tmp_path / 'work_dirs' / 'compare_mine' / 'kd_seed3' / 'epoch_2.pth').is_file()
    table = (tmp_path / 'work_dirs' / 'compare_mine' / 'table.md').read_text()
    assert '| teacher |  | EncoderDecoder | not measured |' in table
    message = "^error: alone, seed 3: its evaluation logged no 'mF1'; choose one of aAcc, mIoU, mAcc with --score$"
    with pytest.raises(SystemExit, match=message):
        compare(folder, '--seeds', 3, '--score', 'mF1', '--report-only')
