import pytest
import torch

import mmkd
from mmkd.distillers.generic.nst import NST, polynomial, selectivity_loss, squared_mmd
from mmkd.testing import detectors, models
from mmkd.testing.batches import random_batch
from mmkd.testing.properties import assert_differentiable, losses


def plain_loops(first, second, kernel):
    def mean(a, b):
        return sum(kernel(x, y) for x in a for y in b) / (len(a) * len(b))

    return mean(first, first) + mean(second, second) - 2 * mean(first, second)


def dot(x, y):
    return sum(a * b for a, b in zip(x, y))


def test_the_discrepancy_as_plain_loops():
    first, second = torch.randn(2, 7, 3, dtype=torch.float64), torch.randn(2, 4, 3, dtype=torch.float64)
    found = squared_mmd(first, second, polynomial)
    for image in range(2):
        expected = plain_loops(first[image].tolist(), second[image].tolist(), lambda x, y: dot(x, y) ** 2)
        assert found[image].item() == pytest.approx(expected, rel=1e-9)
        assert expected > 0


def test_the_loss_as_plain_loops():
    student, teacher = torch.randn(2, 5, 3, 4, dtype=torch.float64), torch.randn(2, 3, 3, 4, dtype=torch.float64)
    total = 0.0
    for s, t in zip(student.flatten(2).tolist(), teacher.flatten(2).tolist()):
        unit = [[[value / dot(row, row) ** 0.5 for value in row] for row in each] for each in (s, t)]
        total += plain_loops(*unit, lambda x, y: dot(x, y) ** 2)
    assert selectivity_loss(student, teacher).item() == pytest.approx(total / 2, rel=1e-9)


def test_one_channel_each():
    """At 60 degrees: 1 + 1 - 2 cos^2 = 1.5; opposite maps are alike for a kernel of even degree."""
    s, t = torch.tensor([[[[2.0, 0.0]]]]), torch.tensor([[[[0.5, 0.75**0.5]]]])
    assert selectivity_loss(s, t).item() == pytest.approx(1.5)
    assert selectivity_loss(s, -s).item() == 0


def test_the_order_and_the_scale_of_channels_change_nothing():
    student, teacher = torch.randn(2, 2, 6, 3, 4, dtype=torch.float64)
    expected = selectivity_loss(student, teacher)
    scale = torch.rand(1, 6, 1, 1, dtype=torch.float64) + 0.1
    torch.testing.assert_close(selectivity_loss(student[:, torch.randperm(6)] * scale, teacher * 3), expected)
    torch.testing.assert_close(selectivity_loss(teacher[:, torch.randperm(6)], teacher), 0 * expected)
    torch.testing.assert_close(selectivity_loss(teacher.repeat(1, 2, 1, 1), teacher), 0 * expected)


def test_channels_that_are_dead_have_finite_gradients():
    student = torch.zeros(1, 2, 3, 3, requires_grad=True)
    loss = selectivity_loss(student, torch.randn(1, 3, 3, 3))
    loss.backward()
    assert torch.isfinite(student.grad).all()


def test_it_learns_across_widths_without_an_adapter():
    student, teacher = (models.build(detectors.retinanet(channels), seed=channels) for channels in (16, 24))
    model = mmkd.distill(student, dict(config=teacher), dict(it=dict(type='NST', layer='neck')))
    model.init_weights()
    assert not list(model.distillers.parameters())
    found = losses(model, model.data_preprocessor(random_batch(model, (2, 3, 64, 96)), True))
    assert_differentiable(model, found)


def test_the_sum_over_levels():
    method = NST('neck', loss_weight=2.0)
    pairs = [torch.randn(2, 1, 4, size, size) for size in (8, 4)]
    method.levels.forward = lambda student, teacher: [mmkd.distillers.LevelPair(*pair, 0, 0) for pair in pairs]
    expected = 2 * sum(selectivity_loss(*pair) for pair in pairs)
    torch.testing.assert_close(method({}, {}, None)['loss'], expected)
