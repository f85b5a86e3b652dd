import math

import pytest
import torch

from mmkd.distill import distill
from mmkd.distillers.segmentation.aicsd import AICSD, class_similarity, inter_class_loss
from mmkd.errors import ConfigError
from mmkd.taps import Taps
from mmkd.testing import models, segmentors
from mmkd.testing.batches import random_batch


def plain_loops(logits, tau):
    """(K, K) of one image, in float64."""
    classes = []
    for row in (logits.flatten(1) / tau).tolist():
        powers = [math.exp(value) for value in row]
        classes.append([power / sum(powers) for power in powers])
    matrix = [[sum(p * math.log(p / q) for p, q in zip(a, b)) for b in classes] for a in classes]
    return [[value / math.sqrt(sum(each * each for each in row)) for value in row] for row in matrix]


@pytest.mark.parametrize('tau', [1.0, 3.0])
def test_the_formula_as_plain_loops(tau):
    student, teacher = torch.randn(2, 2, 5, 4, 6, dtype=torch.float64)
    total = 0.0
    for s_image, t_image, found in zip(student, teacher, class_similarity(student, tau)):
        s, t = plain_loops(s_image, tau), plain_loops(t_image, tau)
        torch.testing.assert_close(found, torch.tensor(s, dtype=torch.float64))
        total += sum((a - b) ** 2 for p, q in zip(s, t) for a, b in zip(p, q))
    assert inter_class_loss(student, teacher, tau).item() == pytest.approx(total / (2 * 25), rel=1e-9)


def test_rows_have_length_one_and_the_diagonal_is_zero():
    found = class_similarity(torch.randn(2, 5, 8, 6))
    assert found.shape == (2, 5, 5)
    assert (found >= 0).all()
    torch.testing.assert_close(found.norm(dim=2), torch.ones(2, 5))
    torch.testing.assert_close(found.diagonal(dim1=1, dim2=2), torch.zeros(2, 5), atol=1e-5, rtol=0)


def test_divergences_are_not_symmetric():
    found = class_similarity(torch.randn(1, 2, 4, 6))
    assert found[0, 0].tolist() == pytest.approx([0, 1], abs=1e-5)  # of two classes each row has one other
    found = class_similarity(torch.randn(1, 3, 4, 6))
    assert not torch.allclose(found, found.mT, atol=1e-3)


def test_zero_for_equal_inputs_and_for_a_constant_added_to_a_class():
    student = torch.randn(2, 5, 8, 6)
    assert inter_class_loss(student, student) == 0
    constant = torch.randn(2, 5, 1, 1)
    assert inter_class_loss(student, student + constant).item() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize('case', ['equal classes', 'constant', 'peaked', 'one position'])
def test_degenerate_logits_are_finite_and_differentiable(case):
    student, teacher = torch.randn(2, 2, 5, 4, 6)
    if case == 'equal classes':
        student = student[:, :1].repeat(1, 5, 1, 1)
    elif case == 'constant':
        student = torch.zeros_like(student)
    elif case == 'peaked':
        student = student.clone()
        student[:, :, 0, 0] += 200
    else:
        student, teacher = student[:, :, :1, :1], teacher[:, :, :1, :1]
    student = student.clone().requires_grad_()
    loss = inter_class_loss(student, teacher)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()
    assert student.grad.abs().max() < 10


def test_channels_last_a_batch_of_one_and_the_teachers_gradient():
    student, teacher = torch.randn(2, 1, 5, 4, 6)
    expected = inter_class_loss(student, teacher)
    last = [each.contiguous(memory_format=torch.channels_last) for each in (student, teacher)]
    torch.testing.assert_close(inter_class_loss(*last), expected)
    torch.testing.assert_close(inter_class_loss(*(each.repeat(3, 1, 1, 1) for each in (student, teacher))), expected)
    student, teacher = student.requires_grad_(), teacher.requires_grad_()
    inter_class_loss(student, teacher).backward()
    assert student.grad.any()
    assert teacher.grad is None


def pair(tmp_path, family='pspnet', teacher=None, **options):
    config = teacher or segmentors.pspnet(24, base=16)
    checkpoint = models.save_weights(config, tmp_path / 'teacher.pth')
    student = models.build(getattr(segmentors, family)(), seed=0)
    model = distill(student, dict(config=config, checkpoint=checkpoint), dict(aicsd=dict(type='AICSD', **options)))
    model.sources['teacher'].load()
    return model.train()


@pytest.mark.parametrize('family', ['pspnet', 'deeplabv3', 'segformer'])
def test_a_training_step(family, tmp_path):
    """Without ground truth too."""
    model = pair(tmp_path, family, loss_weight=3.0, tau=2.0)
    assert not list(model.distillers.parameters())
    data = model.data_preprocessor(random_batch(model, (2, 3, 64, 96)), True)
    with Taps(model, ['decode_head.conv_seg']) as student:
        loss = model(**data, mode='loss')['aicsd.loss']
    (s,), (t,) = student['decode_head.conv_seg'], model.sources['teacher'](data['inputs'], None)['decode_head.conv_seg']
    s = torch.nn.functional.interpolate(s, t.shape[2:], mode='bilinear')
    assert loss > 0
    torch.testing.assert_close(loss, 3 * inter_class_loss(s, t, 2.0))
    loss.backward()
    assert model.decode_head.conv_seg.weight.grad.any()
    assert all(each.grad is None for each in model.sources['teacher'].model.parameters())


def test_it_can_fade(tmp_path):
    model = pair(tmp_path, loss_weight=dict(type='linear', start=4.0, value=0.0, end=2))
    data = model.data_preprocessor(random_batch(model, (2, 3, 64, 96)), True)
    found = [model(**data, mode='loss').get('aicsd.loss') for _ in range(3)]
    assert found[0] > found[1] > 0
    assert found[2] is None


def test_logits_of_other_classes_are_an_error(tmp_path):
    with pytest.raises(ConfigError, match='19 channels'):
        pair(tmp_path, teacher=segmentors.pspnet(classes=7))


@pytest.mark.parametrize('options', [dict(tau=0), dict(tau='1'), dict(loss_weight='1')])
def test_options_out_of_range_are_errors(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        AICSD(**options)
