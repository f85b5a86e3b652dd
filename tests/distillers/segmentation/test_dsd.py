import math

import pytest
import torch
import torch.nn.functional as F

from mmkd.distill import distill
from mmkd.distillers.segmentation.dsd import DSD, category_similarity_loss, pixel_similarity_loss
from mmkd.errors import ConfigError
from mmkd.taps import Taps
from mmkd.testing import models, segmentors
from mmkd.testing.batches import random_batch


def unit(values):
    length = math.sqrt(sum(value * value for value in values))
    return [value / length for value in values]


def test_pixel_similarity_as_plain_loops():
    student, teacher = torch.rand(2, 3, 2, 1, 4, 5, dtype=torch.float64)
    total = 0.0
    for b in range(2):
        for m in range(3):
            for n in range(m + 1, 3):
                rows = []
                for maps in (student, teacher):
                    q = [unit(maps[i, b].flatten().tolist()) for i in (m, n)]
                    rows.append(unit([x - y for x, y in zip(*q)]))
                total += sum((x - y) ** 2 for x, y in zip(*rows))
    found = pixel_similarity_loss(list(student), list(teacher))
    assert found.item() == pytest.approx(total / (3 * 2 * 20), rel=1e-9)


@pytest.mark.parametrize('tau', [1.0, 4.0])
def test_category_similarity_as_plain_loops(tau):
    student, teacher = 3 * torch.randn(2, 2, 5, 4, 6, dtype=torch.float64)
    total = 0.0
    for b in range(2):
        matrices = []
        for logits in (student, teacher):
            rows = []
            for plane in logits[b].tolist():
                pooled = [
                    sum(plane[2 * y + v][2 * x + u] for v in (0, 1) for u in (0, 1)) / 4
                    for y in range(2)
                    for x in range(3)
                ]
                powers = [math.exp(value / tau) for value in pooled]
                rows.append([power / sum(powers) for power in powers])
            matrices.append([[sum(p * q for p, q in zip(a, c)) for c in rows] for a in rows])
        total += sum((x - y) ** 2 for p, q in zip(*matrices) for x, y in zip(p, q))
    assert category_similarity_loss(student, teacher, tau).item() == pytest.approx(total / (2 * 25), rel=1e-9)


def test_zero_for_equal_inputs_and_unchanged_by_scale_or_a_constant():
    maps, logits = torch.rand(3, 2, 1, 4, 6).unbind(), torch.randn(2, 5, 4, 6)
    assert pixel_similarity_loss(maps, maps) == 0
    scaled = [each * scale for each, scale in zip(maps, (0.5, 2.0, 7.0))]
    assert pixel_similarity_loss(scaled, maps).item() == pytest.approx(0, abs=1e-9)
    assert category_similarity_loss(logits, logits) == 0
    assert category_similarity_loss(logits + torch.randn(2, 5, 1, 1), logits).item() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize('size', [(1, 1), (1, 3), (5, 7)])
def test_odd_and_tiny_maps(size):
    student, teacher = torch.randn(2, 2, 5, *size)
    student.requires_grad_()
    loss = category_similarity_loss(student, teacher)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()


def test_maps_that_are_equal_or_zero_are_finite_and_differentiable():
    teacher = torch.rand(3, 2, 1, 4, 6).unbind()
    for maps in (torch.rand(1, 2, 1, 4, 6).repeat(3, 1, 1, 1, 1), torch.zeros(3, 2, 1, 4, 6)):
        maps.requires_grad_()
        loss = pixel_similarity_loss(maps.unbind(), teacher)
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(maps.grad).all()


def test_the_gradient_reaches_the_student_alone():
    student, teacher = (torch.rand(3, 2, 1, 4, 6, requires_grad=True) for _ in range(2))
    pixel_similarity_loss(student.unbind(), teacher.unbind()).backward()
    assert student.grad.any()
    assert teacher.grad is None
    student, teacher = (torch.randn(2, 5, 4, 6, requires_grad=True) for _ in range(2))
    category_similarity_loss(student, teacher).backward()
    assert student.grad.any()
    assert teacher.grad is None


def pair(tmp_path, family='pspnet', teacher=None, **options):
    config = teacher or segmentors.pspnet(24, base=16)
    checkpoint = models.save_weights(config, tmp_path / 'teacher.pth')
    student = models.build(getattr(segmentors, family)(), seed=0)
    model = distill(student, dict(config=config, checkpoint=checkpoint), dict(dsd=dict(type='DSD', **options)))
    model.sources['teacher'].load()
    return model.train()


@pytest.mark.parametrize('family', ['pspnet', 'deeplabv3'])
def test_a_training_step(family, tmp_path):
    """Other numbers of channels, other strides, and the teacher's auxiliary head is run."""
    model = pair(tmp_path, family, pixel_weight=3.0, category_weight=2.0, tau=2.0)
    assert not list(model.distillers.parameters())
    layers = ['auxiliary_head.conv_seg', 'decode_head.dropout:input', 'decode_head.conv_seg']
    assert list(model.distillers.dsd.student_layers) == list(model.distillers.dsd.teacher_layers) == layers
    data = model.data_preprocessor(random_batch(model, (2, 3, 64, 96)), True)
    with Taps(model, layers) as student:
        losses = model(**data, mode='loss')
    teacher = model.sources['teacher'](data['inputs'], data['data_samples'])
    s, t = ([taps[layer][0] for layer in layers] for taps in (student, teacher))
    maps = [F.interpolate(each.square().mean(1, keepdim=True), (8, 12), mode='bilinear') for each in s]
    expected = pixel_similarity_loss(maps, [each.square().mean(1, keepdim=True) for each in t])
    torch.testing.assert_close(losses['dsd.loss_pixel'], 3 * expected)
    logits = F.interpolate(s[2], (8, 12), mode='bilinear')
    torch.testing.assert_close(losses['dsd.loss_category'], 2 * category_similarity_loss(logits, t[2], 2.0))
    losses['dsd.loss_pixel'].backward(retain_graph=True)
    assert model.auxiliary_head.conv_seg.weight.grad.any()
    assert model.decode_head.conv_seg.weight.grad.any()
    assert all(each.grad is None for each in model.sources['teacher'].model.parameters())


def test_another_layer_stands_in_for_an_auxiliary_head(tmp_path):
    model = pair(tmp_path, 'pspnet', auxiliary_layer='backbone.layer3')
    data = model.data_preprocessor(random_batch(model, (2, 3, 64, 96)), True)
    assert torch.isfinite(model(**data, mode='loss')['dsd.loss_pixel'])


def test_a_model_without_an_auxiliary_head_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match='auxiliary_layer'):
        pair(tmp_path, 'segformer', segmentors.segformer())


@pytest.mark.parametrize('whose', ['student', 'teacher'])
def test_maps_of_several_sizes_are_an_error(whose, tmp_path):
    layers = dict.fromkeys(('auxiliary_layer', 'teacher_auxiliary_layer'), 'backbone.layer3')
    layers['auxiliary_layer' if whose == 'student' else 'teacher_auxiliary_layer'] = 'backbone.layer1'
    with pytest.raises(ConfigError, match=f'{whose} layers backbone.layer1, .* of one size'):
        pair(tmp_path, **layers)


def test_logits_of_other_classes_are_an_error(tmp_path):
    with pytest.raises(ConfigError, match='19 channels'):
        pair(tmp_path, teacher=segmentors.pspnet(classes=7))


@pytest.mark.parametrize('options', [dict(tau=0), dict(pixel_weight='1'), dict(category_weight=-1)])
def test_options_out_of_range_are_errors(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        DSD(**options)
