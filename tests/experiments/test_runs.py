"""The book-keeping of runs, with runs that are made up or trained by a stand-in."""

import json
import time
from pathlib import Path

import pytest
from mmengine.config import Config
from tqdm import tqdm

from mmkd.errors import ConfigError
from mmkd.experiments import runs
from mmkd.experiments.configs import read, recordable, text_of
from mmkd.experiments.runs import Run
from mmkd.experiments.suites import SUITES

STUDENT = 'mmkd::shapes/retinanet_student.py'


def own(folder, text):
    """A config file of one's own, and its run."""
    path = folder / 'own.py'
    path.write_text(f"_base_ = 'mmkd::shapes/retinanet_student.py'\n{text}\n")
    return Run('own', str(path), folder / 'own')


# configs


@pytest.mark.parametrize('suite', SUITES)
def test_the_generated_data_sets_configs_are_trained_as_they_are(suite):
    for path in SUITES[suite].configs.glob('*.py'):
        assert recordable(read(str(path))) == {}


@pytest.mark.parametrize('name', ['shapes/gid_fcos.py', 'streets/dakd_pspnet.py'])
def test_the_file_that_is_trained_says_the_same_as_the_config(name, tmp_path):
    run = Run('a', f'mmkd::{name}', tmp_path, {'randomness.seed': 3, 'model.teacher.checkpoint': '/a b/c,d.pth'})
    (tmp_path / 'written.py').write_text(text_of(run.read()))
    written = Config.fromfile(tmp_path / 'written.py')
    assert written.to_dict() == run.read().to_dict()
    assert written.model.teacher.checkpoint == '/a b/c,d.pth'


def test_logs_and_checkpoints_count_what_the_loop_counts(tmp_path):
    loop = "train_cfg = dict(_delete_=True, type='EpochBasedTrainLoop', max_epochs=12)"
    run = own(tmp_path, loop)
    hooks = run.read().default_hooks
    assert hooks.logger.log_metric_by_epoch is True
    assert (hooks.checkpoint.by_epoch, hooks.checkpoint.interval) == (True, 1)
    assert (run.unit, run.length, run.checkpoint.name) == ('epoch', 12, 'epoch_12.pth')
    run = own(tmp_path, "default_hooks = dict(_delete_=True, checkpoint=dict(filename_tmpl='{}.pth', out_dir='/x'))")
    assert recordable(read(run.config)) == {
        'default_hooks.logger.type': 'LoggerHook',
        'default_hooks.logger.log_metric_by_epoch': False,
        'default_hooks.checkpoint.type': 'CheckpointHook',
        'default_hooks.checkpoint.by_epoch': False,
        'default_hooks.checkpoint.interval': 600,
        'default_hooks.checkpoint.filename_tmpl': None,
        'default_hooks.checkpoint.out_dir': None,
    }
    assert (run.unit, run.length, run.checkpoint.name) == ('iter', 600, 'iter_600.pth')


# the log


def test_a_finished_run_is_reused_and_an_interrupted_line_skipped(tmp_path, finish, capsys):
    run = Run('a', STUDENT, tmp_path / 'run')
    finish(run, 0.3)
    with next((tmp_path / 'run').glob('*/vis_data/scalars.json')).open('a') as file:
        file.write('{"loss": 1.0, "ste')
    assert run.finished
    run.train('[1/1]')
    assert 'finished before, reused' in capsys.readouterr().out
    assert [entry['step'] for entry in run.evaluations()] == [200, 600]
    assert run.scores() == {'coco/bbox_mAP': 0.3}


def test_a_run_without_its_last_evaluation_is_not_finished(tmp_path, finish):
    run = Run('a', STUDENT, tmp_path / 'run')
    finish(run, 0.3)
    log = next((tmp_path / 'run').glob('*/vis_data/scalars.json'))
    *before, last = log.read_text().splitlines()
    log.write_text('\n'.join(before) + '\n')
    assert not run.finished
    nothing_detected = {key: value for key, value in json.loads(last).items() if 'mAP' not in key}
    log.write_text('\n'.join([*before, json.dumps(nothing_detected)]) + '\n')
    assert not run.finished


def test_epochs_count_evaluations_and_iterations_losses(tmp_path):
    run = own(tmp_path, 'train_cfg = dict(_delete_=True, by_epoch=True, max_epochs=2)')
    log = run.folder / '20260101_000000' / 'vis_data' / 'scalars.json'
    log.parent.mkdir(parents=True)
    entries = [{'loss': 1.0, 'time': 9.0, 'step': 2}, {'mIoU': 1.0, 'step': 1}]
    entries += [{'loss': 1.0, 'time': 0.5, 'step': step} for step in (20, 30)]
    log.write_text('\n'.join(map(json.dumps, entries)) + '\n')
    run.checkpoint.touch()
    assert not run.finished
    with log.open('a') as file:
        file.write(json.dumps({'mIoU': 2.0, 'step': 2}) + '\n')
    assert run.finished
    assert run.scores() == {'mIoU': 2.0}
    assert run.step_times() == [0.5, 0.5]  # the first tenth is left out


@pytest.mark.parametrize(
    ('loop', 'lines', 'place', 'total'),
    [
        ('max_iters=600', ['Iter(train) [ 20/600]  lr: 1', 'Iter(train) [ 40/600]', 'Iter(val) [ 3/25]'], 40, 600),
        ('max_epochs=12', ['Epoch(train)  [1][ 50/125]', 'Epoch(train)  [3][  5/125]  lr'], 255, 1500),
        ('max_epochs=12', ['Epoch(train)  [1][ 50/125]', 'Epoch(val)  [1][ 9/10]'], 50, 1500),
        ('max_iters=600', ['Config: Epoch(train)', 'nothing'], 0, None),
    ],
)
def test_the_progress_bar_follows_the_log(tmp_path, loop, lines, place, total):
    run = own(tmp_path, f'train_cfg = dict(_delete_=True, {loop})')
    with tqdm(disable=False) as bar:
        for line in lines:
            run._show(f'2026/01/01 00:00:00 - mmengine - INFO - {line}\n', bar)
        assert (bar.n, bar.total) == (place, total)


# training


def test_work_begun_with_another_config_is_not_mixed_with_it(tmp_path, finish):
    run = Run('a', STUDENT, tmp_path / 'run', {'randomness.seed': 0})
    finish(run, 0.3)
    run.train('[1/1]')
    run.options['optim_wrapper.optimizer.lr'] = 1.0
    with pytest.raises(ConfigError, match='begun with another version of .*remove'):
        run.train('[1/1]')


def test_another_config_of_the_teacher_is_another_config(configs, tmp_path):
    teacher = configs / 'retinanet_teacher.py'
    run = Run('a', str(configs / 'gid_retinanet.py'), tmp_path, {'model.teacher.config': str(teacher)})
    before = run.check_unchanged()
    teacher.write_text(f'{teacher.read_text()}model = dict(bbox_head=dict(stacked_convs=1))\n')
    assert run.check_unchanged() != before


def test_a_run_is_resumed_where_there_is_a_checkpoint_and_begins_with_load_from_elsewhere(tmp_path, notes):
    run = own(tmp_path, "load_from = 'weights.pth'")
    run.train('[1/1]')
    assert '--resume' not in notes()[0]['arguments']
    assert Config.fromfile(notes()[0]['arguments'][0]).load_from == 'weights.pth'
    (run.folder / '20260101_000000' / 'vis_data' / 'scalars.json').unlink()
    (run.folder / '20260101_000000' / 'vis_data').rmdir()
    (run.folder / '20260101_000000').rmdir()
    run.checkpoint.unlink()
    (run.folder / 'iter_200.pth').touch()
    (run.folder / 'last_checkpoint').write_text(str(run.folder / 'iter_200.pth'))
    run.train('[1/1]')
    assert '--resume' in notes()[1]['arguments']


@pytest.mark.parametrize('before', [(), (200, 400)])
def test_a_run_that_was_stopped_in_its_last_evaluation_goes_back_to_the_checkpoint_before(tmp_path, before):
    run = Run('a', STUDENT, tmp_path)
    for iteration in (*before, 600):
        (tmp_path / f'iter_{iteration}.pth').touch()
    last = tmp_path / 'last_checkpoint'
    last.write_text(str(run.checkpoint))
    run._step_back()
    assert not run.checkpoint.is_file()
    assert last.is_file() == bool(before)
    if before:
        assert last.read_text() == str(tmp_path / 'iter_400.pth')


def test_jobs_run_at_the_same_time_and_share_the_cores(tmp_path, notes, monkeypatch):
    monkeypatch.setenv('TOGETHER', '2')  # each waits until two have begun
    queue = [Run(name, STUDENT, tmp_path / name) for name in 'ab']
    ended = []
    assert runs.train_all(queue, jobs=2, threads=5, done=ended.append) == {}
    assert {call['threads'] for call in notes()} == {'5'}
    assert all(run.finished for run in queue)
    assert {run.name for run in ended} == {'a', 'b'}


def test_an_interruption_ends_what_runs_and_begins_nothing_more(tmp_path, notes, monkeypatch):
    monkeypatch.setenv('SLEEP', '600')
    stock = runs.wait

    def interrupted(*args, **options):
        monkeypatch.setattr(runs, 'wait', stock)
        while not notes():
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, 'wait', interrupted)
    queue = [Run(name, STUDENT, tmp_path / name) for name in 'abc']
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
    run = Run('a', STUDENT, tmp_path / 'a_student')
    run.folder.mkdir()
    (run.folder / 'output.log').write_text('KeyError: of before\n')
    monkeypatch.setenv('FAIL', 'student')
    (line,) = runs.train_all([run]).values()
    assert 'made to fail' in line
    monkeypatch.delenv('FAIL')
    Path(runs.TRAIN[-1]).write_text('raise SystemExit("worse")\n')
    (line,) = runs.train_all([run]).values()
    assert 'worse' in line
    assert 'made to fail' not in line
    assert 'of before' not in line


def test_step_times_leave_out_the_warm_up_and_evaluations(tmp_path, finish):
    run = Run('a', STUDENT, tmp_path / 'a')
    finish(run, 0.1, [9.0, 9.0, 9.0] + [0.1] * 14 + [0.2] * 13)  # the first tenth is 60 iterations, three entries
    assert run.step_times() == [0.1] * 14 + [0.2] * 13
