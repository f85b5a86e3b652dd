"""What `mmkd inspect` shows, and the figures behind it."""

import json

import pytest
import torch
from mmengine.config import Config
from tool import tool
from torch import nn

from mmkd import distill
from mmkd.analysis.costs import cost, share_of_step, training_size
from mmkd.analysis.layers import survey
from mmkd.analysis.overview import described
from mmkd.analysis.schedules import Curve, learning_rate, weights
from mmkd.hosts.mmengine import CONFIG_ROOT
from mmkd.testing import detectors, models, segmentors


class Tiny(nn.Module):
    """A model whose cost is known by hand."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.neck = nn.Conv2d(8, 4, 1)
        self.data_preprocessor = nn.Identity()

    def extract_feat(self, images):
        return self.neck(self.backbone(images))


def test_multiplications_and_parameters_are_those_counted_by_hand():
    model = Tiny()
    found = cost(model, (16, 32))
    assert found.parameters == found.trained == 3 * 8 * 9 + 8 * 4 + 4
    assert found.flops == 8 * 16 * (3 * 8 * 9 + 8 * 4)
    frozen = cost(model.requires_grad_(False), (16, 32))
    short = cost(model, (16, 32), ['backbone'], {'backbone': 1})
    assert short.flops == 8 * 16 * 3 * 8 * 9
    assert share_of_step(found, [short]) == pytest.approx(short.flops / (3 * found.flops + short.flops))
    assert share_of_step(found, [found]) == 0.5  # a peer is trained
    assert share_of_step(found, [frozen]) == 0.25


def test_what_selects_proposals_is_counted_by_a_real_pass():
    model = models.build(detectors.faster_rcnn())
    whole, rpn = cost(model, (64, 64)), cost(model, (64, 64), ['rpn_head'], {'rpn_head': 1})
    assert whole.flops > rpn.flops > 0


def test_the_layers_of_a_detector():
    model = models.build(detectors.retinanet())
    found = {each.name: each for each in survey(model).layers}
    assert found['neck'].calls == 1
    assert found['neck'].strides == (8, 16, 32)
    assert [shape[1:] for shape in found['neck'].shapes] == [(32, 32), (16, 16), (8, 8)]
    assert found['bbox_head.retina_cls'].calls == 3
    assert found['bbox_head.loss_cls'].calls == 0
    assert not found['backbone.bn1'].tappable  # the ReLU behind it works in place
    assert not any(name.startswith('data_preprocessor') for name in found)


def test_of_a_distilled_segmentor_the_student_alone():
    student, teacher = (models.build(each) for each in (segmentors.pspnet(), segmentors.pspnet(24)))
    model = distill(student, teacher, dict(skd=dict(type='SKD')))
    names = [each.name for each in survey(model).layers]
    assert 'decode_head.conv_seg' in names
    assert not any(name.startswith(('distillers', 'sources')) for name in names)


@pytest.mark.parametrize(
    ('config', 'size'),
    [('gid_retinanet.py', (800, 1344)), ('skd_pspnet.py', (512, 1024)), ('shapes/gid_retinanet.py', None)],
)
def test_the_size_that_a_pipeline_says(config, size):
    assert training_size(Config.fromfile(CONFIG_ROOT / config)) == size


def test_the_learning_rate_is_that_of_mmengines_schedulers():
    config = Config.fromfile(CONFIG_ROOT / 'gid_retinanet.py')
    curve = learning_rate(config, 100)  # 24 epochs, warm-up of 500 iterations, steps after 16 and 22
    assert len(curve.values) == 1000
    at = {iteration: curve.values[round(iteration * 999 / 2399)] for iteration in (0, 250, 600, 1590, 1620, 2300)}
    assert at[0] == pytest.approx(0.01 * 0.001)
    assert at[250] == pytest.approx(0.01 * (0.001 + 0.999 * 250 / 499), rel=0.01)
    assert [at[each] for each in (600, 1590, 1620, 2300)] == pytest.approx([1e-2, 1e-2, 1e-3, 1e-4])


def test_a_curve_is_drawn_from_nought_to_its_largest_value():
    assert Curve('a', (0.0, 1.0, 2.0, 4.0)).draw() == '▁▃▅█'
    assert len(Curve('a', tuple(range(1000))).draw(40)) == 40
    assert Curve('a', (0.0, 0.0)).draw() == '▁▁'


def test_loss_weights_that_change():
    student, teacher = (models.build(detectors.retinanet()) for _ in range(2))
    ramp = dict(type='linear', value=10.0, end=100)
    methods = dict(cwd=dict(type='CWD', layer='neck', loss_weight=ramp), at=dict(type='AT', layer='neck'))
    (curve,) = weights(distill(student, teacher, methods).distillers, 201)
    assert curve.name == 'cwd.loss_weight'
    assert curve.values[100] == curve.values[200] == 10
    assert curve.values[50] == 5


@pytest.mark.slow
def test_the_command_fits_80_columns_and_writes_all_as_json(tmp_path):
    printed = tool('inspect', CONFIG_ROOT / 'shapes' / 'gid_retinanet.py', '--json', tmp_path / 'seen.json')
    assert max(map(len, printed.splitlines())) <= 80
    assert '* neck ' in printed
    assert 'gid: GID: student learns from teacher' in printed
    assert 'learning rate' in printed
    seen = json.loads((tmp_path / 'seen.json').read_text())
    student, teacher = seen['networks']
    assert (student['name'], teacher['name']) == ('student', 'teacher')
    (neck,) = [each for each in student['layers'] if each['name'] == 'neck']
    assert neck['tapped']
    assert neck['strides'] == [8, 16, 32, 64]
    assert 0 < seen['teachers_share_of_multiplications'] < 1


@pytest.mark.slow
def test_the_commands_filter_and_its_mistakes(tmp_path):
    config = CONFIG_ROOT / 'shapes' / 'gid_retinanet.py'
    printed = tool('inspect', config, '--filter', 'bbox_head.cls_convs.0*')
    layers = printed[: printed.index('Costs')]
    assert 'bbox_head.cls_convs.0' in layers
    assert 'backbone' not in layers
    assert 'none is called nothing*' in tool('inspect', config, '--filter', 'nothing*')
    said = tool('inspect', CONFIG_ROOT / 'shapes' / 'retinanet_student.py', expect=1)
    assert said.splitlines()[-1] == 'error: model: it has no student; a plain model learns from nobody'
    said = tool('inspect', config, '--json', tmp_path / 'no' / 'seen.json', expect=1)
    assert said.splitlines()[-1].startswith('error: --json ')
    assert torch.is_grad_enabled()


def test_one_method_of_several_teachers():
    teachers = {name: dict(config=models.build(detectors.retinanet())) for name in 'ab'}
    distillers = dict(
        kd=dict(type='KD', teacher=['a', 'b'], combine='entropy'),
        cwd=dict(type='CWD', layer='neck', teacher=['a', 'b']),
    )
    model = distill(models.build(detectors.retinanet()), teachers, distillers)
    assert described('kd', model) == ('KD of several teachers, entropy: student learns from a, b', 'reads bbox_head')
    first, *pairs = described('cwd', model)
    assert first == 'CWD of several teachers, mean: student learns from a, b'
    assert len(pairs) == 2
