"""The comparison of methods: its checks and its queue, with runs that a stand-in trains."""

import json
import os

import pytest
from mmengine.config import Config

from mmkd.experiments.comparison import Comparison, lock, suite_of
from mmkd.experiments.suites import SUITES
from mmkd.hosts.mmengine import CONFIG_ROOT

SHAPES = SUITES['shapes']


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


# what is refused before anything is trained


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ('default_hooks = dict(checkpoint=None)', 'default_hooks.checkpoint=None'),
        ("visualizer = dict(vis_backends=[dict(type='TensorboardVisBackend')])", 'LocalVisBackend'),
        ("train_cfg = dict(_delete_=True, type='MyLoop')", 'expected max_iters or max_epochs'),
    ],
)
def test_runs_that_would_leave_no_score_are_refused_before_training(configs, notes, compare, change, message):
    student = configs / 'retinanet_student.py'
    student.write_text(f'{student.read_text()}{change}\n')
    with pytest.raises(SystemExit, match=f'^error: .*retinanet_student.py: .*{message}'):
        compare(configs, '--seeds', '0')
    assert notes() == []


def test_data_and_a_given_teachers_weights_are_looked_for_before_training(
    configs, notes, compare, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match='retinanet_teacher.py: train_dataloader.dataset.data_root: .* does not exist'):
        compare(configs, '--seeds', '0')
    monkeypatch.setattr('mmkd.checks.check_data', lambda *_: None)
    (configs / 'retinanet_teacher.py').rename(configs / '_base_' / 'teacher.py')
    edit(configs / '_base_' / 'teacher.py', '_base_/', '')
    edit(configs / 'gid_retinanet.py', 'retinanet_teacher.py', '_base_/teacher.py')
    with pytest.raises(
        SystemExit, match=r'gid_retinanet.py: teacher checkpoint .*iter_1500.pth: no such file .* is trained first'
    ):
        compare(configs, '--seeds', '0')
    assert notes() == []


# the queue


@pytest.mark.slow
def test_teachers_come_first_then_seed_by_seed_with_the_trained_teacher(tmp_path, notes, compare, capsys):
    folder = tmp_path / 'work'
    command = ['shapes', 'gid_retinanet', 'cwd_retinanet', '--seeds', '3', '4', '--work-dir', folder]
    compare(*command)
    names = ['retinanet_student', 'cwd_retinanet', 'gid_retinanet']
    order = ['retinanet_teacher', *(f'{name}_seed3' for name in names), *(f'{name}_seed4' for name in names)]
    assert [call['folder'] for call in notes()] == order
    last = Config.fromfile(notes()[-1]['arguments'][0])
    stock = Config.fromfile(CONFIG_ROOT / 'shapes' / 'gid_retinanet.py')
    stock.merge_from_dict({'randomness.seed': 4, 'train_cfg.val_interval': 600})
    stock.model.teacher.checkpoint = f'{folder}/retinanet_teacher/iter_1500.pth'
    assert last.to_dict() == stock.to_dict()
    alone = Config.fromfile(notes()[4]['arguments'][0])
    assert (alone.randomness.seed, alone.train_cfg.val_interval) == (4, 600)
    assert 'teacher' not in alone.model
    assert {call['threads'] for call in notes()} == {str(len(os.sched_getaffinity(0)))}
    assert json.loads((folder / 'results.json').read_text())['methods']['gid_retinanet']['gain'] == 0
    capsys.readouterr()
    compare(*command)
    assert len(notes()) == 7
    assert capsys.readouterr().out.count('finished before, reused') == 7


def test_a_failed_run_does_not_stop_the_others_and_the_exit_status_is_1(tmp_path, notes, compare, monkeypatch, capsys):
    monkeypatch.setenv('FAIL', 'student_seed0')
    with pytest.raises(SystemExit) as exit:
        compare('shapes', 'gid_retinanet', '--seeds', '0', '1', '--work-dir', tmp_path / 'work')
    assert exit.value.code == 1
    assert len(notes()) == 5
    line = 'retinanet_student, seed 0 failed: ValueError: made to fail (see'
    assert f'Failed: {line}' in capsys.readouterr().out
    assert line in (tmp_path / 'work' / 'table.md').read_text()


def test_without_its_teacher_a_method_is_not_trained(tmp_path, notes, compare, monkeypatch, capsys):
    monkeypatch.setenv('FAIL', 'teacher')
    with pytest.raises(SystemExit):
        compare('shapes', 'gid_retinanet', '--seeds', '0', '--work-dir', tmp_path / 'work')
    assert [call['folder'] for call in notes()] == ['retinanet_teacher', 'retinanet_student_seed0']
    assert 'gid_retinanet, seed 0 not trained: its teacher, retinanet_teacher, failed' in capsys.readouterr().out


def test_report_only_trains_nothing(tmp_path, notes, compare, fabricate, gid, capsys):
    fabricate(tmp_path / 'work', (gid,), seeds=(0,))
    compare('shapes', 'gid_retinanet', '--seeds', '0', '1', '--work-dir', tmp_path / 'work', '--report-only')
    assert notes() == []
    assert 'Missing: gid_retinanet: seed 1 not begun' in capsys.readouterr().out
    assert (tmp_path / 'work' / 'report.html').is_file()


def test_a_run_begun_with_another_config_is_an_error_that_names_its_folder(tmp_path, notes, compare):
    command = ['shapes', 'gid_retinanet', '--seeds', '0', '--work-dir', tmp_path / 'work']
    compare(*command)
    folder = tmp_path / 'work' / 'gid_retinanet_seed0'
    (folder / 'fingerprint').write_text('of another version')
    for more in ([], ['--report-only']):
        with pytest.raises(SystemExit, match=f'error: {folder}: begun with another version of .*gid_retinanet.py'):
            compare(*command, *more)
    assert len(notes()) == 3


def test_a_second_queue_in_the_same_folder_is_refused(tmp_path, notes, compare):
    with lock(tmp_path / 'work'), pytest.raises(SystemExit, match='another comparison is at work'):
        compare('shapes', 'gid_retinanet', '--work-dir', tmp_path / 'work')
    assert notes() == []


def test_a_score_that_was_not_logged_ends_the_queue_after_the_first_run(tmp_path, notes, compare):
    command = ['shapes', 'gid_retinanet', '--seeds', '0', '--work-dir', tmp_path / 'work', '--score', 'coco/AR']
    for _ in range(2):
        with pytest.raises(
            SystemExit, match="retinanet_teacher: its evaluation logged no 'coco/AR'; .* coco/bbox_mAP with"
        ):
            compare(*command)
        assert len(notes()) == 1
    compare(*command[:-1], 'coco/bbox_mAP')
    assert len(notes()) == 3  # what was finished is reused


# a teacher's files


def test_a_teacher_in_the_folder_is_named_by_its_full_path(configs, tmp_path):
    suite, methods = suite_of(str(configs))
    made = Comparison(suite, methods, (0,), tmp_path / 'work')
    teacher = made.runs['gid_retinanet'][0].read().model.teacher
    assert teacher.config == str(configs / 'retinanet_teacher.py')
    assert teacher.checkpoint == str(tmp_path / 'work' / 'retinanet_teacher' / 'iter_1500.pth')


def test_a_teacher_by_name_alone_gets_its_checkpoint(configs, tmp_path):
    method = configs / 'gid_retinanet.py'
    text = method.read_text()
    start, end = text.index('    teacher='), text.index('    # Tuned')
    method.write_text(f"{text[:start]}    teacher='retinanet_teacher.py',\n{text[end:]}")
    suite, methods = suite_of(str(configs))
    made = Comparison(suite, methods, (0,), tmp_path / 'work')
    assert made.runs['gid_retinanet'][0].read().model.teacher == dict(
        config=str(configs / 'retinanet_teacher.py'),
        checkpoint=str(tmp_path / 'work' / 'retinanet_teacher' / 'iter_1500.pth'),
    )


def test_a_given_teachers_files_are_found_beside_the_config_and_else_from_where_one_works(
    configs, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (configs / 'weights').mkdir()
    (configs / '_base_' / 'teacher.py').write_text("_base_ = 'retinanet.py'\n")
    edit(configs / 'gid_retinanet.py', 'retinanet_teacher.py', '_base_/teacher.py')
    text = (configs / 'gid_retinanet.py').read_text()
    start = text.index("checkpoint='") + len("checkpoint='")
    (configs / 'gid_retinanet.py').write_text(f'{text[:start]}weights/t.pth{text[text.index(chr(39), start) :]}')
    suite, methods = suite_of(str(configs))
    assert methods[0].given == {'model.teacher': '_base_/teacher.py'}

    def checkpoint():
        teacher = Comparison(suite, methods, (0,), tmp_path / 'work').runs['gid_retinanet'][0].read().model.teacher
        assert teacher.config == str(configs / '_base_' / 'teacher.py')
        return teacher.checkpoint

    assert checkpoint() == 'weights/t.pth'
    (configs / 'weights' / 't.pth').touch()
    assert checkpoint() == str(configs / 'weights' / 't.pth')
