"""The comparison of methods: its book-keeping and its arithmetic, with runs that are made up or trained by a stand-in."""

import dataclasses
import json
import os
import shutil
import sys
import time
from pathlib import Path

import pytest
from matplotlib import pyplot as plt

sys.path.append(str(Path(__file__).parents[1] / 'tools'))

import compare
import runs
from compare import Comparison, Method
from runs import Run
from suites import SUITES

from mmkd.errors import ConfigError
from mmkd.hosts.mmengine import CONFIG_ROOT

SHAPES = SUITES['shapes']
GID = Method('gid_retinanet', 'retinanet_student', 'retinanet_teacher')
CWD = Method('cwd_retinanet', 'retinanet_student', 'retinanet_teacher')

# Instead of tools/train.py: leaves what a finished training leaves, and notes how it was called.
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
log.write_text(json.dumps({'coco/bbox_mAP': 0.2, 'step': iterations}))
(folder / f'iter_{iterations}.pth').touch()
"""


@pytest.fixture
def notes(tmp_path, monkeypatch):
    """Puts the stand-in in the place of the training tool; what it was called with, as a function."""
    script = tmp_path / 'train.py'
    script.write_text(STAND_IN)
    monkeypatch.setattr(runs, 'TRAIN', script)
    quiet = dataclasses.replace(SHAPES, generate=lambda: 'nothing')
    monkeypatch.setitem(SUITES, 'shapes', quiet)

    def read() -> list[dict]:
        path = tmp_path / 'notes'
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

    return read


@pytest.fixture
def configs(tmp_path):
    """A copy of configs/shapes with few methods."""
    folder = tmp_path / 'shapes'
    folder.mkdir()
    shutil.copytree(CONFIG_ROOT / 'shapes' / '_base_', folder / '_base_')
    for name in ('retinanet_student', 'retinanet_teacher', 'fcos_student', 'fcos_teacher', 'gid_retinanet'):
        shutil.copy(CONFIG_ROOT / 'shapes' / f'{name}.py', folder)
    return folder


def finish(run: Run, ap: float, times=(0.1,) * 30):
    """Leave what a finished run leaves: a time every 20 iterations, evaluations, a checkpoint."""
    log = run.folder / '20260101_000000' / 'vis_data' / 'scalars.json'
    log.parent.mkdir(parents=True)
    entries = [{'loss': 1.0, 'time': each, 'step': 20 * (index + 1)} for index, each in enumerate(times)]
    entries += [{SHAPES.key: 0.01, 'time': 9.0, 'step': 200}, {SHAPES.key: ap, 'time': 9.0, 'step': run.iterations}]
    log.write_text('\n'.join(map(json.dumps, entries)) + '\n')
    run.checkpoint.touch()


def fabricate(folder, methods=(GID,), seeds=(0, 1)) -> Comparison:
    """A finished comparison: teacher 0.38; alone 0.10, 0.14; GID 0.20, 0.30; CWD as alone."""
    made = Comparison(SHAPES, methods, seeds, folder)
    for run in made.teachers.values():
        finish(run, 0.38)
    aps = {
        'retinanet_student': (0.1, 0.14),
        'fcos_student': (0.1, 0.14),
        'gid_retinanet': (0.2, 0.3),
        'gid_fcos': (0.2, 0.3),
        'cwd_retinanet': (0.1, 0.14),
    }
    for name, of_seed in made.runs.items():
        for run, ap in zip(of_seed.values(), aps[name]):
            finish(run, ap)
    return made


def cells(results, column):
    return {row['method']: row[column] for row in compare.rows(results)}


# discovery


def test_every_config_with_distillers_is_found_with_its_student_and_teacher():
    methods = {method.name: method for method in compare.discover(SHAPES.configs)}
    assert methods['gid_retinanet'] == GID
    assert methods['cwd_retinanet'] == CWD
    files = {path.stem for path in (CONFIG_ROOT / 'shapes').glob('*.py')}
    assert set(methods) == {name for name in files if not name.endswith(('_student', '_teacher'))}


def test_methods_can_be_restricted_and_a_wrong_name_says_the_nearest():
    assert compare.discover(SHAPES.configs, ['gid_retinanet']) == [GID]
    with pytest.raises(ConfigError, match="gid_retinane: no such method .* 'gid_retinanet'"):
        compare.discover(SHAPES.configs, ['gid_retinane'])


def test_the_teacher_may_be_of_another_family(configs):
    text = (configs / 'gid_retinanet.py').read_text().replace('shapes/retinanet_teacher.py', 'shapes/fcos_teacher.py')
    (configs / 'pkd_retinanet.py').write_text(text)
    assert compare.discover(configs) == [GID, Method('pkd_retinanet', 'retinanet_student', 'fcos_teacher')]


def test_another_student_or_budget_than_the_student_alone_is_refused(configs):
    path = configs / 'gid_retinanet.py'
    text = path.read_text()
    path.write_text(text + 'train_cfg = dict(max_iters=700)\n')
    with pytest.raises(ConfigError, match='gid_retinanet: its train_cfg is not that of retinanet_student'):
        compare.discover(configs)
    path.write_text(text)
    student = configs / 'retinanet_student.py'
    student.write_text(student.read_text().replace('stacked_convs=2', 'stacked_convs=3'))
    assert compare.discover(configs) == [GID]  # it inherits the change
    path.write_text(text.replace('student=_base_.model', 'student=dict(_base_.model, neck=None)'))
    with pytest.raises(ConfigError, match='its student is the model of 0 configs'):
        compare.discover(configs)


# arithmetic


def test_gain_and_errors_are_those_of_a_hand_calculation():
    # differences 0.10 and 0.16; variances 0.0008 and 0.005; s_d = 0.06 / sqrt(2)
    found = compare.compare({0: 0.10, 1: 0.14}, {0: 0.20, 1: 0.30}, 0.38)
    assert found['gain'] == pytest.approx(0.13)
    assert found['gap_closed'] == pytest.approx(0.13 / 0.26)
    assert found['unpaired']['error'] == pytest.approx((0.0008 / 2 + 0.005 / 2) ** 0.5)
    assert found['unpaired']['ratio'] == pytest.approx(0.13 / 0.0029**0.5)
    assert found['paired']['error'] == pytest.approx(0.03)
    assert found['paired']['ratio'] == pytest.approx(13 / 3)
    assert found['unpaired']['significant']
    assert found['paired']['significant']


def test_two_standard_errors_are_what_counts():
    # seeds agree on the gain: the paired error is nearly 0, the unpaired one is 0.1
    found = compare.compare({0: 0.1, 1: 0.3}, {0: 0.25, 1: 0.451}, None)
    assert found['unpaired']['ratio'] < 2
    assert found['unpaired']['significant'] is False
    assert found['paired']['significant'] is True
    assert compare.compare({0: 0.2, 1: 0.201}, {0: 0.1, 1: 0.101}, None)['unpaired']['significant'] is False


def test_only_seeds_that_both_have_are_compared():
    found = compare.compare({0: 0.1, 2: 0.5, 1: 0.14}, {1: 0.30, 3: 0.9, 0: 0.2}, 0.38)
    assert found == compare.compare({0: 0.1, 1: 0.14}, {0: 0.2, 1: 0.3}, 0.38)


def test_what_cannot_be_known_is_none():
    one = compare.compare({0: 0.1}, {0: 0.2}, 0.3)
    assert one['gain'] == pytest.approx(0.1)
    assert one['gap_closed'] == pytest.approx(0.5)
    assert one['unpaired'] == one['paired'] == {'error': None, 'ratio': None, 'significant': None}
    nothing = compare.compare({0: 0.1}, {1: 0.2}, 0.3)
    assert (nothing['gain'], nothing['gap_closed']) == (None, None)
    same = compare.compare({0: 0.1, 1: 0.1}, {0: 0.2, 1: 0.2}, 0.05)
    assert same['gap_closed'] is None  # the teacher is worse
    assert same['unpaired'] == {'error': 0.0, 'ratio': None, 'significant': True}


def test_the_step_time_is_a_ratio_of_medians_after_warm_up(tmp_path):
    alone, distilled = (Run(name, 'mmkd::shapes/retinanet_student.py', tmp_path / name) for name in 'ab')
    finish(alone, 0.1, [9.0, 9.0, 9.0] + [0.1] * 14 + [0.2] * 13)  # the first tenth is 60 iterations, three entries
    finish(distilled, 0.1, [0.0, 0.0, 0.0] + [0.3] * 27)
    assert compare.ratio_of_times([distilled], [alone]) == pytest.approx(0.3 / 0.1)
    assert compare.ratio_of_times([], []) is None


# results, table, chart


def test_the_table_has_what_the_runs_left(tmp_path):
    results = fabricate(tmp_path, (GID, CWD)).results()
    assert json.loads(json.dumps(results)) == results
    assert (results['missing'], results['failed']) == ({}, {})
    assert list(cells(results, 'AP').items()) == [
        ('student alone', '0.120 ± 0.028'),
        ('teacher', '0.380'),
        ('gid_retinanet', '0.250 ± 0.071'),  # the best first
        ('cwd_retinanet', '0.120 ± 0.028'),
    ]
    (row,) = [row for row in compare.rows(results) if row['method'] == 'gid_retinanet']
    assert row == {
        'method': 'gid_retinanet',
        'student': 'retinanet',
        'teacher': 'retinanet',
        'AP': '0.250 ± 0.071',
        'AP of seeds': '0.200 0.300',
        'gain': '+0.130',
        'SE': '0.054',
        'gain / SE': '2.4',
        '> 2 SE': 'yes',
        'gap closed': '50 %',
        'step time': '1.00',
    }
    assert '| gid_retinanet | retinanet | retinanet | 0.250 ± 0.071 | 0.200 0.300 | +0.130 |' in compare.markdown(
        results
    )


def test_one_seed_has_no_spread(tmp_path):
    results = fabricate(tmp_path, seeds=(0,)).results()
    (row,) = [row for row in compare.rows(results) if row['method'] == 'gid_retinanet']
    assert [row[column] for column in ('AP', 'gain', 'SE', 'gain / SE', '> 2 SE')] == ['0.200', '+0.100', '', '', '']
    compare.write(results, tmp_path / 'report')
    assert (tmp_path / 'report' / 'chart.png').stat().st_size > 10_000


def test_missing_and_failed_runs_are_named_and_left_out(tmp_path):
    made = fabricate(tmp_path, (GID, CWD))
    gid = made.runs['gid_retinanet'][1]
    gid.checkpoint.unlink()
    for run in made.runs['cwd_retinanet'].values():
        shutil.rmtree(run.folder)
    results = made.results()
    assert cells(results, 'AP of seeds')['gid_retinanet'] == '0.200 -'
    assert cells(results, 'gain')['gid_retinanet'] == '+0.100'
    assert cells(results, 'AP')['cwd_retinanet'] == 'not finished'
    assert set(compare.notes(results)) == {
        'Missing: cwd_retinanet: not begun',
        'Missing: gid_retinanet: seed 1 stopped after iteration 600',
    }
    failed = made.results({str(gid.folder): 'gid_retinanet, seed 1 failed: it is broken'})
    assert compare.notes(failed)[0] == 'Failed: gid_retinanet, seed 1 failed: it is broken'
    assert not any('seed 1 stopped' in note for note in compare.notes(failed))


def test_without_a_student_alone_or_a_teacher_there_is_no_gain_but_a_report(tmp_path):
    made = fabricate(tmp_path)
    for run in [*made.runs['retinanet_student'].values(), *made.teachers.values()]:
        run.checkpoint.unlink()
    results = made.results()
    assert cells(results, 'AP')['gid_retinanet'] == '0.250 ± 0.071'
    assert cells(results, 'gain')['gid_retinanet'] == cells(results, 'step time')['gid_retinanet'] == ''
    assert compare.write(results, tmp_path / 'report').is_file()


def test_the_chart_has_a_panel_per_student_with_bars_and_lines(tmp_path):
    methods = (Method('gid_fcos', 'fcos_student', 'fcos_teacher'), GID, CWD)
    figure = compare.chart(fabricate(tmp_path, methods).results())
    fcos, retinanet = figure.axes
    assert [text.get_text() for text in retinanet.get_yticklabels()] == ['gid  +0.130', 'cwd  +0.000']
    assert [bar.get_width() for bar in retinanet.patches[:2]] == pytest.approx([0.25, 0.12])
    errors = [line for bars in retinanet.containers if hasattr(bars, 'has_xerr') for line in bars.lines[2]]
    (first,), _ = (each.get_segments() for each in errors)
    assert first[:, 0] == pytest.approx([0.25 - 0.005**0.5, 0.25 + 0.005**0.5])
    labels = {line.get_label(): line.get_xdata()[0] for line in fcos.lines if not line.get_label().startswith('_')}
    assert labels == pytest.approx({'student alone 0.120': 0.12, 'fcos teacher 0.380': 0.38})
    assert retinanet.get_xlim()[1] > 0.38
    plt.close(figure)


def test_the_report_is_written_and_its_picture_is_not_blank(tmp_path):
    results = fabricate(tmp_path).results({'x': 'x failed: <b>'})
    report = compare.write(results, tmp_path / 'report')
    picture = plt.imread(tmp_path / 'report' / 'chart.png')
    assert picture.shape[0] > 200
    assert picture.shape[1] > 1000
    assert 0.02 < (picture[..., :3].min(-1) < 0.95).mean() < 0.9  # ink
    page = report.read_text()
    assert 'data:image/svg+xml;base64,' in page
    assert '<td>gid_retinanet</td>' in page
    assert 'Failed: x failed: &lt;b&gt;' in page
    assert json.loads((tmp_path / 'report' / 'results.json').read_text()) == results
    assert (tmp_path / 'report' / 'table.md').read_text() == compare.markdown(results)


# the queue


def test_teachers_come_first_then_seed_by_seed_with_the_trained_teacher(tmp_path, notes, capsys):
    folder = tmp_path / 'work'
    command = ['shapes', 'gid_retinanet', 'cwd_retinanet', '--seeds', '3', '4', '--work-dir', str(folder)]
    compare.main(command)
    names = ['retinanet_student', 'cwd_retinanet', 'gid_retinanet']
    assert [call['folder'] for call in notes()] == [
        'retinanet_teacher',
        *(f'{name}_seed3' for name in names),
        *(f'{name}_seed4' for name in names),
    ]
    last = notes()[-1]
    assert last['arguments'][0] == 'mmkd::shapes/gid_retinanet.py'
    teacher = f'model.teacher.checkpoint={folder}/retinanet_teacher/iter_1500.pth'
    options = ['--cfg-options', 'randomness.seed=4', 'train_cfg.val_interval=600']
    assert last['arguments'][-4:] == [*options, teacher]
    assert notes()[4]['arguments'][-3:] == options
    assert {call['threads'] for call in notes()} == {str(len(os.sched_getaffinity(0)))}
    assert json.loads((folder / 'results.json').read_text())['methods']['gid_retinanet']['gain'] == 0
    capsys.readouterr()
    compare.main(command)
    assert len(notes()) == 7
    assert capsys.readouterr().out.count('finished before, reused') == 7


def test_a_failed_run_does_not_stop_the_others_and_the_exit_status_is_1(tmp_path, notes, monkeypatch, capsys):
    monkeypatch.setenv('FAIL', 'student_seed0')
    with pytest.raises(SystemExit) as exit:
        compare.main(['shapes', 'gid_retinanet', '--seeds', '0', '1', '--work-dir', str(tmp_path / 'work')])
    assert exit.value.code == 1
    assert len(notes()) == 5
    line = 'retinanet_student, seed 0 failed: ValueError: made to fail (see'
    assert f'Failed: {line}' in capsys.readouterr().out
    assert line in (tmp_path / 'work' / 'table.md').read_text()


def test_without_its_teacher_a_method_is_not_trained(tmp_path, notes, monkeypatch, capsys):
    monkeypatch.setenv('FAIL', 'teacher')
    with pytest.raises(SystemExit):
        compare.main(['shapes', 'gid_retinanet', '--seeds', '0', '--work-dir', str(tmp_path / 'work')])
    assert [call['folder'] for call in notes()] == ['retinanet_teacher', 'retinanet_student_seed0']
    assert 'gid_retinanet, seed 0 not trained: its teacher, retinanet_teacher, failed' in capsys.readouterr().out


def test_report_only_trains_nothing(tmp_path, notes, capsys):
    fabricate(tmp_path / 'work', seeds=(0,))
    compare.main(
        ['shapes', 'gid_retinanet', '--seeds', '0', '1', '--work-dir', str(tmp_path / 'work'), '--report-only']
    )
    assert notes() == []
    assert 'Missing: gid_retinanet: seed 1 not begun' in capsys.readouterr().out
    assert (tmp_path / 'work' / 'report.html').is_file()


def test_a_run_begun_with_another_config_is_an_error_that_names_its_folder(tmp_path, notes):
    compare.main(['shapes', 'gid_retinanet', '--seeds', '0', '--work-dir', str(tmp_path / 'work')])
    folder = tmp_path / 'work' / 'gid_retinanet_seed0'
    (folder / 'fingerprint').write_text('of another version')
    for more in ([], ['--report-only']):
        with pytest.raises(SystemExit, match=f'error: {folder}: begun with another version of .*gid_retinanet.py'):
            compare.main(['shapes', 'gid_retinanet', '--seeds', '0', '--work-dir', str(tmp_path / 'work'), *more])
    assert len(notes()) == 3


def test_a_second_queue_in_the_same_folder_is_refused(tmp_path, notes):
    with compare.lock(tmp_path / 'work'), pytest.raises(SystemExit, match='another compare.py is at work'):
        compare.main(['shapes', 'gid_retinanet', '--work-dir', str(tmp_path / 'work')])
    assert notes() == []


def test_jobs_run_at_the_same_time_and_share_the_cores(tmp_path, notes, monkeypatch):
    monkeypatch.setenv('TOGETHER', '2')  # each waits until two have begun
    queue = [Run(name, 'mmkd::shapes/retinanet_student.py', tmp_path / name) for name in 'ab']
    assert runs.train_all(queue, jobs=2, threads=5) == {}
    assert {call['threads'] for call in notes()} == {'5'}
    assert all(run.finished for run in queue)


def test_an_interruption_ends_what_runs_and_begins_nothing_more(tmp_path, notes, monkeypatch):
    monkeypatch.setenv('SLEEP', '600')
    stock = runs.wait

    def interrupted(*args, **options):
        monkeypatch.setattr(runs, 'wait', stock)
        while not notes():
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, 'wait', interrupted)
    queue = [Run(name, 'mmkd::shapes/retinanet_student.py', tmp_path / name) for name in 'abc']
    with pytest.raises(KeyboardInterrupt):
        runs.train_all(queue)
    assert queue[0]._process.poll() is not None
    assert len(notes()) == 1


def test_the_reason_of_a_failure_is_one_line():
    crash = 'Traceback (most recent call last):\n  File "x"\nmypackage.OddError: broken\nsome farewell\n'
    assert runs.reason_of_failure(1, crash) == 'mypackage.OddError: broken'
    assert runs.reason_of_failure(1, 'error: no such layer\n') == 'error: no such layer'
    assert runs.reason_of_failure(1, 'a\nlast words\n\n') == 'last words'
    assert runs.reason_of_failure(-9, 'a\n') == 'ended by signal 9'
    assert 'without a score' in runs.reason_of_failure(0, '')


def test_an_earlier_attempts_error_is_not_this_ones(tmp_path, notes, monkeypatch):
    run = Run('a', 'mmkd::shapes/retinanet_student.py', tmp_path / 'a_student')
    run.folder.mkdir()
    (run.folder / 'output.log').write_text('KeyError: of before\n')
    monkeypatch.setenv('FAIL', 'student')
    assert list(runs.train_all([run])) == [str(run.folder)]
    monkeypatch.setattr(runs, 'TRAIN', tmp_path / 'there is no such file.py')
    (line,) = runs.train_all([run]).values()
    assert 'made to fail' not in line
    assert 'of before' not in line
