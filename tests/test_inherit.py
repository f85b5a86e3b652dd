"""The inheriting strategy: parts of the student that start from the teacher's weights."""

import pytest
import torch
from mmengine.config import Config

from mmkd.distill import distill
from mmkd.errors import ConfigError
from mmkd.testing import detectors, models

CWD = dict(cwd=dict(type='CWD', layer='neck'))
# a batch norm in the neck, as the teacher's is folded away after loading
TEACHER = detectors.retinanet(neck=dict(norm_cfg=dict(type='BN')))


@pytest.fixture
def teacher(tmp_path):
    return dict(config=TEACHER, checkpoint=models.save_weights(TEACHER, tmp_path / 'teacher.pth'))


def test_parts_start_from_the_teachers_weights_and_the_others_do_not(teacher):
    model = distill(TEACHER, teacher, CWD, inherit=['neck', 'bbox_head'])
    model.init_weights()
    weights = torch.load(teacher['checkpoint'], weights_only=True)['state_dict']
    for name, value in model.state_dict().items():
        if name.startswith(('neck.', 'bbox_head.')):
            assert torch.equal(value, weights[name]), name
    assert not torch.equal(model.backbone.conv1.weight, weights['backbone.conv1.weight'])
    assert all(parameter.requires_grad for parameter in model.neck.parameters())


def test_a_teacher_that_was_loaded_before_is_an_error_and_not_left_out(teacher):
    model = distill(TEACHER, teacher, CWD, inherit=['neck'])
    model.sources['teacher'].load()
    with pytest.raises(
        ConfigError, match='^teacher: was loaded by itself, before the parts that start from its weights'
    ):
        model.init_weights()
    model = distill(TEACHER, teacher, CWD)
    model.sources['teacher'].load()
    model.init_weights()
    again = distill(TEACHER, teacher, CWD, inherit=['neck'])
    again.init_weights()
    again.init_weights()  # as a Runner does after the user


def test_student_and_teacher_share_no_memory(teacher):
    model = distill(TEACHER, teacher, CWD, inherit=['bbox_head'])
    model.init_weights()
    before = model.sources['teacher'].model.bbox_head.retina_cls.weight.clone()
    with torch.no_grad():
        model.bbox_head.retina_cls.weight.add_(1)
    assert torch.equal(model.sources['teacher'].model.bbox_head.retina_cls.weight, before)


@pytest.mark.parametrize(
    ('inherit', 'student', 'message'),
    [
        ('neck', dict(), r"inherit='neck': expected a list"),
        (['kneck'], dict(), 'no such module; the nearest are .*neck'),
        (
            ['bbox_head'],
            dict(classes=5),
            r'bbox_head.retina_cls.weight is \(15, 16, 3, 3\) in the student and \(9, 16, 3, 3\)',
        ),
        (['neck'], dict(), r'neck.lateral_convs.0.conv.bias is \(16,\) in the student and not there in the teacher'),
    ],
)
def test_what_cannot_be_inherited_is_one_clear_line(teacher, inherit, student, message):
    with pytest.raises(ConfigError, match=message) as error:
        distill(detectors.retinanet(**student), teacher, CWD, inherit=inherit)
    assert '\n' not in str(error.value)


def test_each_of_several_teachers_gives_its_own_part(tmp_path):
    start = {
        name: models.save_weights(TEACHER, tmp_path / f'{name}.pth', seed=seed) for seed, name in enumerate('ab', 1)
    }
    teachers = {name: dict(config=TEACHER, checkpoint=path) for name, path in start.items()}
    distillers = {f'cwd_{name}': dict(type='CWD', layer='neck', teacher=name) for name in 'ab'}
    model = distill(TEACHER, teachers, distillers, inherit=dict(a=['neck'], b=['bbox_head']))
    model.init_weights()
    for part, name in (('neck.lateral_convs.0.conv.weight', 'a'), ('bbox_head.retina_cls.weight', 'b')):
        expected = {each: torch.load(path, weights_only=True)['state_dict'][part] for each, path in start.items()}
        assert not torch.equal(expected['a'], expected['b'])
        assert torch.equal(model.state_dict()[part], expected[name])
    with pytest.raises(ConfigError, match=r'^inherit.c: there is no such frozen teacher; there are a, b$'):
        distill(TEACHER, teachers, distillers, inherit=dict(c=['neck']))


def test_in_a_config(teacher):
    config = Config(
        dict(model=dict(type='mmkd.Distill', student=TEACHER, teacher=teacher, distillers=CWD, inherit=['neck']))
    )
    from mmengine.registry import MODELS

    model = MODELS.build(config.model)
    model.init_weights()
    weights = torch.load(teacher['checkpoint'], weights_only=True)['state_dict']
    assert torch.equal(model.neck.lateral_convs[0].conv.weight, weights['neck.lateral_convs.0.conv.weight'])
