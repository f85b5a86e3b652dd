"""What is compared with what, as a folder of configs says."""

import re
import shutil

import pytest
from mmengine.config import Config

from mmkd.errors import ConfigError
from mmkd.experiments.comparison import Comparison, suite_of
from mmkd.experiments.discovery import Method, discover
from mmkd.experiments.suites import SUITES

SHAPES = SUITES['shapes']


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


FAMILIES = ('faster_rcnn', 'retinanet', 'fcos', 'gfl', 'pspnet', 'segformer')
STUDENTS = {
    'dakd_pspnet': 'pspnet_dusk',
    'byot_pspnet': 'pspnet_auxiliary',
    'tofd_pspnet': 'pspnet_auxiliary',
    'kd_pspnet_middle': 'pspnet_middle',
}


@pytest.mark.parametrize('suite', SUITES)
def test_every_config_with_distillers_is_found_with_its_student_and_teacher(suite):
    folder = SUITES[suite].configs
    methods = {method.name: method for method in discover(folder)}
    files = {path.stem for path in folder.glob('*.py')}
    assert set(methods) == {name for name in files if not name.endswith(('_student', '_teacher'))}
    for name, method in methods.items():
        family = next(each for each in FAMILIES if f'_{each}' in name)
        assert method.student == f'{STUDENTS.get(name, family)}_student'
        teacher = Config.fromfile(folder / f'{name}.py').model.teacher
        named = re.findall(r"'config': 'mmkd::\w+/(\w+_teacher|kd_\w+)\.py'", str(teacher))
        assert list(method.teachers.values()) == named
        assert method.given == {}


def test_methods_can_be_restricted_and_a_wrong_name_says_the_nearest(gid):
    assert discover(SHAPES.configs, ['gid_retinanet']) == [gid]
    with pytest.raises(ConfigError, match="gid_retinane: no such method .* 'gid_retinanet'"):
        discover(SHAPES.configs, ['gid_retinane'])
    with pytest.raises(ConfigError, match='retinanet_student: no such method'):
        discover(SHAPES.configs, ['retinanet_student'])


def test_the_teacher_may_be_of_another_family(configs, gid):
    shutil.copy(SHAPES.configs / 'fcos_teacher.py', configs)
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
    for none in (
        "dict(type='Own')",
        "dict(checkpoint='x.pth', dtype=None)",
    ):  # of the second the training will complain
        method.write_text(f'{text[:start]}    teacher={none},\n{text[end:]}')
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
    with pytest.raises(
        ConfigError, match='own: none of its configs has model.distillers.*retinanet_student, retinanet_teacher'
    ):
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
    with pytest.raises(
        ConfigError, match='without distillers; with another val_dataloader there is retinanet_student$'
    ):
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


def test_a_teachers_assistant_is_trained_between_its_teacher_and_its_student(configs, tmp_path):
    text = (configs / 'gid_retinanet.py').read_text()
    (configs / 'assisted.py').write_text(text.replace('retinanet_teacher.py', 'gid_retinanet.py'))
    assert discover(configs, ['assisted']) == [
        Method('assisted', 'retinanet_student', {'model.teacher': 'gid_retinanet'})
    ]
    suite, methods = suite_of(str(configs), ['assisted'])
    comparison = Comparison(suite, methods, [0], tmp_path)
    assert list(comparison.teachers) == ['retinanet_teacher', 'gid_retinanet']
    for run, teacher in (
        (comparison.teachers['gid_retinanet'], 'retinanet_teacher'),
        (comparison.runs['assisted'][0], 'gid_retinanet'),
    ):
        assert run.read().model.teacher.checkpoint == str(comparison.teachers[teacher].checkpoint)


def test_teachers_that_teach_each_other(configs):
    text = (configs / 'gid_retinanet.py').read_text()
    (configs / 'assisted.py').write_text(text.replace('retinanet_teacher.py', 'gid_retinanet.py'))
    edit(configs / 'gid_retinanet.py', 'retinanet_teacher.py', 'assisted.py')
    with pytest.raises(
        ConfigError, match='gid_retinanet: it is taught by itself, gid_retinanet <- assisted <- gid_retin'
    ):
        discover(configs, ['assisted'])


def test_a_teacher_that_cannot_be_trained(configs):
    edit(configs / 'retinanet_teacher.py', 'train_cfg = ', 'train_cfg = None\nunused = ')
    with pytest.raises(
        ConfigError, match='gid_retinanet: model.teacher.config is retinanet_teacher, which has no train_cfg'
    ):
        discover(configs)


def test_a_file_that_is_no_config(configs):
    (configs / 'broken.py').write_text('model = dict(type=\n')
    with pytest.raises(ConfigError, match='broken.py: cannot be read as a config: SyntaxError'):
        discover(configs)
