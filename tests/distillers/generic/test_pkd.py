import math

import pytest
import torch

from mmkd.distillers.generic.pkd import PKD, pearson_loss, standardize
from mmkd.errors import ConfigError
from mmkd.hosts.running import probe
from mmkd.taps import Taps
from mmkd.testing import detectors, models


def plain_loops(student, teacher, eps):
    """The formula, channel by channel, in float64."""
    batch, channels, height, width = student.shape
    count = batch * height * width
    total = 0.0
    for c in range(channels):
        standard = []
        for feature in (student, teacher):
            values = [value for image in feature[:, c] for value in image.flatten().tolist()]
            mean = sum(values) / count
            deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1))
            standard.append([(value - mean) / (deviation + eps) for value in values])
        total += sum((s - t) ** 2 for s, t in zip(*standard))
    return total / (2 * channels * count)


@pytest.mark.parametrize('eps', [1e-6, 0.3])
def test_the_formula_as_plain_loops(eps):
    student, teacher = torch.randn(2, 2, 3, 4, 5, dtype=torch.float64)
    found = pearson_loss(3 * student + 1, teacher**3, eps).item()
    assert found == pytest.approx(plain_loops(3 * student + 1, teacher**3, eps), rel=1e-6)


def test_it_is_one_less_the_correlation():
    student, teacher = torch.randn(2, 2, 3, 4, 5, dtype=torch.float64)
    rows = [each.transpose(0, 1).flatten(1) for each in (student, student + teacher)]
    correlation = [torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(*rows)]
    expected = sum(1 - each for each in correlation) / 3 * 39 / 40
    torch.testing.assert_close(pearson_loss(student, student + teacher, eps=0.0), expected)


def test_scale_and_offset_of_a_channel_change_nothing():
    student, teacher = torch.randn(2, 2, 3, 8, 8, dtype=torch.float64)
    scale, offset = torch.rand(2, 1, 3, 1, 1, dtype=torch.float64) + 0.1
    expected = pearson_loss(student, teacher)
    torch.testing.assert_close(pearson_loss(scale * student + offset, teacher), expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(pearson_loss(student, scale * teacher + offset), expected, rtol=1e-4, atol=0)
    assert pearson_loss(teacher, teacher).item() == 0


@pytest.mark.parametrize('value', [0.0, 3.1, -1e4])
def test_a_constant_channel_is_zero_with_a_finite_gradient(value):
    student, teacher = torch.randn(2, 2, 3, 8, 8)
    student[:, 1] = value
    teacher[:, 2] = value
    student.requires_grad_()
    loss = pearson_loss(student, teacher)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()
    assert student.grad[:, 1].abs().sum() == 0
    assert (student.grad[:, 0].abs() > 0).all()
    assert (standardize(student)[:, 1] == 0).all()
    assert (standardize(teacher)[:, 2] == 0).all()


def test_a_channel_that_is_constant_up_to_rounding_is_constant():
    feature = torch.full((2, 1, 8, 8), 3.1)
    feature[0, 0, ::2] = torch.nextafter(feature[0, 0, ::2], torch.tensor(torch.inf))
    assert feature.unique().numel() == 2
    assert (standardize(feature) == 0).all()
    feature = 1e-4 * torch.randn(2, 1, 8, 8) + 3.1
    assert standardize(feature).std().item() == pytest.approx(1, abs=0.02)


def test_a_single_value_per_channel_is_constant():
    student = torch.randn(1, 3, 1, 1, requires_grad=True)
    loss = pearson_loss(student, torch.randn(1, 3, 1, 1))
    loss.backward()
    assert loss.item() == 0
    assert (student.grad == 0).all()


def test_an_overflow_stays_one():
    student, teacher = torch.randn(2, 2, 3, 8, 8)
    student[0, 0, 0, 0] = torch.inf
    assert not torch.isfinite(pearson_loss(student, teacher))


def tapped(student, teacher, distiller, size=(96, 128)):
    distiller.setup(probe(student, distiller.student_layers), probe(teacher, distiller.teacher_layers))
    images = torch.randn(2, 3, *size)
    taps = []
    for model, layers in ((student, distiller.student_layers), (teacher, distiller.teacher_layers)):
        with Taps(model, layers) as read:
            model.extract_feat(images)
        taps.append(read)
    return taps


def test_equal_networks_and_the_sum_over_levels():
    student, teacher, other = (models.build(detectors.retinanet(), seed=seed) for seed in (0, 0, 1))
    distiller = PKD('neck', loss_weight=2.0, eps=0.3)
    assert distiller(*tapped(student, teacher, distiller), None)['loss'].item() == 0
    taps = tapped(student, other, distiller)
    expected = 2 * sum(pearson_loss(s, t, 0.3) for s, t in zip(taps[0]['neck'], taps[1]['neck'], strict=True))
    torch.testing.assert_close(distiller(*taps, None)['loss'], expected)
    assert len(taps[0]['neck']) == 3


@pytest.mark.parametrize('channels', [16, 24])
def test_gradients_reach_the_student_and_the_adapter_where_channels_differ(channels):
    """Across families: only where channels differ is there anything to train beside the student."""
    student = models.build(detectors.retinanet(), seed=0)
    teacher = models.build(detectors.fcos(channels=channels), seed=1)
    distiller = PKD('neck')
    distiller(*tapped(student, teacher, distiller), None)['loss'].backward()
    parameters = list(distiller.parameters())
    assert len(parameters) == (0 if channels == 16 else 6)
    # the bias of an adapter is a constant added to a channel
    assert all(each.grad.abs().sum() > 0 for each in parameters if each.dim() == 4)
    assert all(each.grad is not None for each in parameters)
    assert student.neck.lateral_convs[0].conv.weight.grad.abs().sum() > 0
    assert all(each.grad is None for each in teacher.parameters())


def test_levels_in_order_are_resized_to_the_teachers():
    """P3 of a student with P2 of a teacher."""
    student = models.build(detectors.retinanet(neck=dict(num_outs=5)), seed=0)
    teacher = models.build(detectors.faster_rcnn(), seed=1)
    by_index = PKD('neck', match='index')
    s, t = tapped(student, teacher, by_index)
    expected = sum(
        pearson_loss(torch.nn.functional.interpolate(a, b.shape[2:], mode='bilinear', align_corners=False), b)
        for a, b in zip(s['neck'], t['neck'], strict=True)
    )
    torch.testing.assert_close(by_index(s, t, None)['loss'], 10 * expected)
    by_stride = PKD('neck')
    tapped(student, teacher, by_stride)
    assert by_stride.levels.pairs == [(0, 0, 1), (0, 1, 2), (0, 2, 3), (0, 3, 4)]


@pytest.mark.parametrize('options', [dict(eps=-1.0), dict(eps='a'), dict(match='size'), dict(loss_weight='10')])
def test_options_out_of_range_are_errors(options):
    with pytest.raises(ConfigError, match=next(iter(options)).removeprefix('loss_')):
        PKD('neck', **options)


def test_without_an_epsilon_it_is_not_added():
    feature = torch.randn(2, 3, 4, 5)
    assert PKD('neck', eps=0).compare(feature, 2 * feature).item() == pytest.approx(0, abs=1e-6)
