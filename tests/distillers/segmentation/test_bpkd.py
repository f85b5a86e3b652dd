import math

import pytest
import torch
import torch.nn.functional as F

from mmkd.distill import distill
from mmkd.distillers.generic.cwd import channel_wise_divergence
from mmkd.distillers.generic.kd import pixel_divergence
from mmkd.distillers.segmentation.bpkd import BPKD, boundary_losses, edges
from mmkd.errors import ConfigError
from mmkd.taps import Taps
from mmkd.testing import models, segmentors
from mmkd.testing.batches import random_batch


def test_edges_as_dilated_less_eroded_regions():
    """The union over classes, as plain loops; ignored pixels make no edge and are none."""
    labels = torch.randint(0, 3, (2, 4, 5)).repeat_interleave(4, 1).repeat_interleave(4, 2)
    labels[0, :6, 3:9] = 255
    found = edges(labels, 255, 3)
    for b, image in enumerate(labels.tolist()):
        for y, row in enumerate(image):
            for x, label in enumerate(row):
                near = {
                    image[v][u]
                    for v in range(max(y - 1, 0), min(y + 2, len(image)))
                    for u in range(max(x - 1, 0), min(x + 2, len(row)))
                }
                assert found[b, y, x] == (label != 255 and len(near - {255}) > 1)
    assert found.any()
    assert not found.all()


@pytest.mark.parametrize(('width', 'band'), [(3, 2), (5, 4), (7, 6)])
def test_an_edge_is_as_wide_as_its_window(width, band):
    labels = torch.zeros(1, 10, 20, dtype=torch.long)
    labels[:, :, 10:] = 18
    found = edges(labels, 255, width)
    assert found.sum(2).eq(band).all()
    assert found[0, 0].nonzero().flatten().tolist() == list(range(10 - band // 2, 10 + band // 2))


def softmax(values):
    powers = [math.exp(value - max(values)) for value in values]
    return [power / sum(powers) for power in powers]


def divergence(teacher, student):
    return sum(p * math.log(p / q) for p, q in zip(softmax(teacher), softmax(student)))


@pytest.mark.parametrize('tau', [1.0, 4.0])
def test_both_losses_as_plain_loops(tau):
    student, teacher = torch.randn(2, 2, 5, 4, 6, dtype=torch.float64)
    kind = torch.randint(0, 3, (2, 4, 6))
    edge, body = kind == 0, kind == 1
    at_edges = [
        divergence((t / tau).tolist(), (s / tau).tolist())
        for s, t in zip(student.movedim(1, -1)[edge], teacher.movedim(1, -1)[edge])
    ]
    shapes = [
        divergence((teacher[b, k][body[b]] / tau).tolist(), (student[b, k][body[b]] / tau).tolist())
        for b in range(2)
        for k in range(5)
    ]
    found = boundary_losses(student, teacher, edge, body, tau)
    assert found[0].item() == pytest.approx(tau**2 * sum(at_edges) / len(at_edges), rel=1e-9)
    assert found[1].item() == pytest.approx(tau**2 * sum(shapes) / len(shapes), rel=1e-9)


def test_everything_edge_is_kd_and_everything_body_is_cwd():
    student, teacher = torch.randn(2, 2, 5, 4, 6)
    all_of, none_of = torch.ones(2, 4, 6, dtype=torch.bool), torch.zeros(2, 4, 6, dtype=torch.bool)
    edge, nothing = boundary_losses(student, teacher, all_of, none_of, 2.0)
    torch.testing.assert_close(edge, pixel_divergence(student, teacher, 2.0))
    assert nothing == 0
    nothing, body = boundary_losses(student, teacher, none_of, all_of, 2.0)
    torch.testing.assert_close(body, channel_wise_divergence(student, teacher, 2.0))
    assert nothing == 0


def test_each_loss_sees_its_own_positions_alone():
    student, teacher = torch.randn(2, 2, 5, 4, 6)
    kind = torch.randint(0, 3, (2, 1, 4, 6))
    edge, body = kind[:, 0] == 0, kind[:, 0] == 1
    expected = boundary_losses(student, teacher, edge, body)
    noise = 10 * torch.randn(2, 5, 4, 6)
    torch.testing.assert_close(boundary_losses(student + noise * (kind != 0), teacher, edge, body)[0], expected[0])
    torch.testing.assert_close(boundary_losses(student + noise * (kind != 1), teacher, edge, body)[1], expected[1])


def test_zero_for_equal_inputs_and_differentiable_zeros_for_no_positions():
    student, teacher = torch.randn(2, 2, 5, 4, 6)
    edge = torch.rand(2, 4, 6) < 0.4
    for loss in boundary_losses(student, student, edge, ~edge):
        assert loss.item() == pytest.approx(0, abs=1e-6)
    student.requires_grad_()
    none_of = torch.zeros(2, 4, 6, dtype=torch.bool)
    loss = sum(boundary_losses(student, teacher, none_of, none_of))
    loss.backward()
    assert loss == 0
    assert not student.grad.any()


def test_the_gradient_reaches_the_student_alone():
    student, teacher = (torch.randn(2, 5, 4, 6, requires_grad=True) for _ in range(2))
    edge = torch.rand(2, 4, 6) < 0.4
    for index in range(2):
        student.grad = None
        boundary_losses(student, teacher, edge, ~edge)[index].backward()
        touched = student.grad.abs().sum(1) > 0
        assert torch.equal(touched, edge if index == 0 else ~edge)
    assert teacher.grad is None


def pair(tmp_path, family='pspnet', teacher=None, **options):
    config = teacher or segmentors.pspnet(24, base=16)
    checkpoint = models.save_weights(config, tmp_path / 'teacher.pth')
    student = models.build(getattr(segmentors, family)(), seed=0)
    model = distill(student, dict(config=config, checkpoint=checkpoint), dict(bpkd=dict(type='BPKD', **options)))
    model.sources['teacher'].load()
    return model.train()


def test_edges_are_those_of_the_labels_and_terms_are_weighed(tmp_path):
    """The student's logits, of stride 16, are resized to the teacher's, of stride 8."""
    model = pair(tmp_path, 'deeplabv3', edge_weight=2.0, body_weight=3.0, width=9, tau=2.0)
    data = model.data_preprocessor(random_batch(model, (2, 3, 64, 96), objects=2), True)
    with Taps(model, ['decode_head.conv_seg']) as student:
        losses = model(**data, mode='loss')
    (s,), (t,) = student['decode_head.conv_seg'], model.sources['teacher'](data['inputs'], None)['decode_head.conv_seg']
    labels = torch.cat([sample.gt_sem_seg.data for sample in data['data_samples']])
    edge = edges(labels, 255, 9)[:, 4::8, 4::8]
    body = (labels[:, 4::8, 4::8] != 255) & ~edge
    assert edge.any()
    assert body.any()
    assert not (edge | body).all()
    expected = boundary_losses(F.interpolate(s, t.shape[2:], mode='bilinear'), t, edge, body, 2.0)
    torch.testing.assert_close(losses['bpkd.loss_edge'], 2 * expected[0])
    torch.testing.assert_close(losses['bpkd.loss_body'], 3 * expected[1])
    assert model.distillers.bpkd.pictures(student, None, data['data_samples'])['edges'].shape == (2, 64, 96)


@pytest.mark.parametrize('family', ['pspnet', 'segformer'])
def test_a_training_step(family, tmp_path):
    model = pair(tmp_path, family)
    assert not list(model.distillers.parameters())
    for objects in (4, 0):
        data = model.data_preprocessor(random_batch(model, (2, 3, 64, 96), objects), True)
        losses = {key: value for key, value in model(**data, mode='loss').items() if key.startswith('bpkd.')}
        assert list(losses) == ['bpkd.loss_edge', 'bpkd.loss_body']
        for loss in losses.values():
            model.zero_grad()
            loss.backward(retain_graph=True)
            assert model.decode_head.conv_seg.weight.grad.any() == (objects > 0)
    assert all(each.grad is None for each in model.sources['teacher'].model.parameters())


def test_logits_of_other_classes_are_an_error(tmp_path):
    with pytest.raises(ConfigError, match='19 channels'):
        pair(tmp_path, teacher=segmentors.pspnet(classes=7))


@pytest.mark.parametrize('options', [dict(width=4), dict(width=1), dict(width='7'), dict(tau=0), dict(edge_weight='1')])
def test_options_out_of_range_are_errors(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        BPKD(**options)
