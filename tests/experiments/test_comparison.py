"""The comparison of methods: what is compared with what, and the queue, with runs that a stand-in trains."""

import json
import os
import re
import shutil

import pytest
from mmengine.config import Config

from mmkd.errors import ConfigError
from mmkd.experiments.comparison import Comparison, Method, discover, lock, suite_of
from mmkd.experiments.suites import SUITES
from mmkd.hosts.mmengine import CONFIG_ROOT

SHAPES = SUITES['shapes']
RETINANET = {'model.teacher': 'retinanet_teacher'}


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


# discovery


@pytest.mark.parametrize('suite', SUITES)
def test_every_config_with_distillers_is_found_with_its_student_and_teacher(suite):
    folder = SUITES[suite].configs
    methods = {method.name: method for method in discover(folder)}
    files = {path.stem for path in folder.glob('*.py')}
    assert set(methods) == {name for name in files if not name.endswith(('_student', '_teacher'))}
    for name, method in methods.items():
        family = next(each for each in ('faster_rcnn', 'retinanet', 'fcos', 'gfl', 'pspnet') if name.endswith(each))
        assert method.student == f'{"pspnet_dusk" if name == "dakd_pspnet" else family}_student'
        (teacher,) = re.findall(r"config='mmkd::\w+/(\w+)\.py'", (folder / f'{name}.py').read_text())
        assert method.teachers == {'model.teacher': teacher}
        assert method.given == {}


def test_methods_can_be_restricted_and_a_wrong_name_says_the_nearest(gid):
    assert discover(SHAPES.configs, ['gid_retinanet']) == [gid]
    with pytest.raises(ConfigError, match="gid_retinane: no such method .* 'gid_retinanet'"):
        discover(SHAPES.configs, ['gid_retinane'])
    with pytest.raises(ConfigError, match='retinanet_student: no such method'):
        discover(SHAPES.configs, ['retinanet_student'])


def test_the_teacher_may_be_of_another_family(configs, gid):
    text = (configs / 'gid_retinanet.py').read_text().replace('retinanet_teacher.py', 'fcos_teacher.py')
    (configs / 'pkd_retinanet.py').write_text(text)
    fcos = {'model.teacher': 'fcos_teacher'}
    assert discover(configs) == [gid, Method('pkd_retinanet', 'retinanet_student', fcos)]


def test_names_of_files_do_not_matter(configs):
    (configs / 'retinanet_student.py').rename(configs / 'small.py')
    (configs / 'retinanet_teacher.py').rename(configs / 'large.py')
    edit(configs / 'gid_retinanet.py', 'retinanet_student.py', 'small.py')
    edit(configs / 'gid_retinanet.py', 'retinanet_teacher.py', 'large.py')
    assert discover(configs) == [Method('gid_retinanet', 'small', {'model.teacher': 'large'})]


def test_several_teachers_and_none(configs):
    method = configs / 'gid_retinanet.py'
    start = method.read_text().index('    teacher=')
    end = method.read_text().index('    # Tuned')
    several = """    teacher=dict(
        large=dict(config='retinanet_teacher.py', checkpoint='x.pth'),
        other=dict(config='mmdet::fcos/fcos_r50.py'),
        mean=dict(type='Average')),
"""
    text = method.read_text()
    method.write_text(text[:start] + several + text[end:])
    teachers, given = {'model.teacher.large': 'retinanet_teacher'}, {'model.teacher.other': 'mmdet::fcos/fcos_r50.py'}
    assert discover(configs) == [Method('gid_retinanet', 'retinanet_student', teachers, given)]
    method.write_text(text[:start] + "    teacher=dict(type='Own'),\n" + text[end:])
    assert discover(configs) == [Method('gid_retinanet', 'retinanet_student')]


def test_a_student_may_be_taught_by_itself(configs):
    edit(configs / 'gid_retinanet.py', 'retinanet_teacher.py', 'retinanet_student.py')
    student = {'model.teacher': 'retinanet_student'}
    assert discover(configs) == [Method('gid_retinanet', 'retinanet_student', student)]
    # the same model, trained longer: a teacher, and not a second student alone
    (configs / 'longer.py').write_text("_base_ = 'retinanet_student.py'\ntrain_cfg = dict(max_iters=900)\n")
    edit(configs / 'gid_retinanet.py', "config='retinanet_student.py'", "config='longer.py'")
    assert discover(configs) == [Method('gid_retinanet', 'retinanet_student', {'model.teacher': 'longer'})]


def test_bases_beside_the_configs_are_passed_over(configs, gid):
    (configs / 'data.py').write_text("data_root = 'x'\n")
    (configs / 'model_alone.py').write_text("model = dict(type='RetinaNet')\n")
    assert discover(configs) == [gid]


# what cannot be compared


def test_a_folder_without_methods(configs, tmp_path):
    (configs / 'gid_retinanet.py').unlink()
    with pytest.raises(ConfigError, match='own: none of its configs has model.distillers.*fcos_student, fcos_teacher'):
        discover(configs)
    (tmp_path / 'empty').mkdir()
    with pytest.raises(ConfigError, match='empty: none of its configs .*found no config'):
        suite_of(str(tmp_path / 'empty'))
    with pytest.raises(ConfigError, match='nowhere: no such folder .*or shapes or streets'):
        suite_of('nowhere')


def test_a_method_without_its_student_alone(configs, gid):
    student = configs / 'retinanet_student.py'
    edit(student, 'stacked_convs=2', 'stacked_convs=3')
    assert discover(configs) == [gid]  # it inherits the change
    method = configs / 'gid_retinanet.py'
    text = method.read_text()
    edit(method, 'student=_base_.model', 'student=dict(_base_.model, neck=None)')
    with pytest.raises(
        ConfigError, match='gid_retinanet: no config in .*own is its student alone.*without distillers$'
    ):
        discover(configs)
    method.write_text(text + "val_dataloader = dict(dataset=dict(ann_file='annotations/other.json'))\n")
    with pytest.raises(ConfigError, match='retinanet_student has that model, but another val_dataloader$'):
        discover(configs)


def test_two_students_alone(configs):
    shutil.copy(configs / 'retinanet_student.py', configs / 'small.py')
    with pytest.raises(ConfigError, match='gid_retinanet: 2 configs .* retinanet_student, small; leave one'):
        discover(configs)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ('train_cfg = dict(max_iters=700)', 'its train_cfg is not that of retinanet_student'),
        ('train_dataloader = dict(batch_size=16)', 'batch_size is 16, and that of retinanet_student is 8'),
        ("val_evaluator = dict(metric=['bbox', 'proposal'])", 'its val_evaluator is not that of retinanet_student'),
        ('val_evaluator = None', 'it has no val_evaluator'),
    ],
)
def test_another_budget_or_score_than_the_student_alone(configs, change, message):
    method = configs / 'gid_retinanet.py'
    method.write_text(f'{method.read_text()}{change}\n')
    with pytest.raises(ConfigError, match=f'^gid_retinanet: .*{message}'):
        discover(configs)


def test_a_teacher_that_distills_itself(configs):
    text = (configs / 'gid_retinanet.py').read_text()
    (configs / 'assistant.py').write_text(text.replace('retinanet_teacher.py', 'gid_retinanet.py'))
    with pytest.raises(ConfigError, match='assistant: model.teacher.config is gid_retinanet, which distills itself'):
        discover(configs)


def test_a_file_that_is_no_config(configs):
    (configs / 'broken.py').write_text('model = dict(type=\n')
    with pytest.raises(ConfigError, match='broken.py: cannot be read as a config: SyntaxError'):
        discover(configs)


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
        compare(configs)
    assert notes() == []


def test_data_and_a_given_teachers_weights_are_looked_for_before_training(
    configs, notes, compare, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match='retinanet_teacher.py: train_dataloader.dataset.data_root: .* does not exist'):
        compare(configs)
    monkeypatch.setattr('mmkd.checks.check_data', lambda *_: None)
    (tmp_path / 'elsewhere').mkdir()
    (configs / 'retinanet_teacher.py').rename(configs / '_base_' / 'teacher.py')
    edit(configs / '_base_' / 'teacher.py', '_base_/', '')
    edit(configs / 'gid_retinanet.py', 'retinanet_teacher.py', '_base_/teacher.py')
    with pytest.raises(
        SystemExit, match=r'gid_retinanet.py: teacher checkpoint .*iter_1500.pth: no such file .* is trained first'
    ):
        compare(configs)
    assert notes() == []


# the queue


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
    with lock(tmp_path / 'work'), pytest.raises(SystemExit, match='another compare.py is at work'):
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
