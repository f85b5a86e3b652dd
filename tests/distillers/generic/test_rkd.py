import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from mmkd.distillers.generic.rkd import angle_loss, distance_loss
from mmkd.testing.closed_form import closed_form_inputs


def smooth(a, b):
    return 0.5 * (a - b) ** 2 if abs(a - b) < 1 else abs(a - b) - 0.5


def distance_loops(student, teacher):
    found = []
    for rows in (student.tolist(), teacher.tolist()):
        each = [math.dist(a, b) for a in rows for b in rows]
        positive = [d for d in each if d > 0]
        mean = sum(positive) / len(positive) if positive else 1.0
        found.append([d / mean for d in each])
    return sum(map(smooth, *found)) / len(found[0])


def angle_loops(student, teacher):
    found = []
    for rows in (student.tolist(), teacher.tolist()):
        angles = []
        for i, j, k in itertools.product(rows, repeat=3):
            a, b = ([y - x for x, y in zip(i, other)] for other in (j, k))
            length = math.hypot(*a) * math.hypot(*b)
            angles.append(sum(x * y for x, y in zip(a, b)) / length if length else 0.0)
        found.append(angles)
    return sum(map(smooth, *found)) / len(found[0])


def test_the_values_of_public_code():
    """mdistiller's distances; mmrazor's distances and angles, of embeddings of length 1."""
    student, teacher = closed_form_inputs((4, 6))
    assert distance_loss(student, teacher).item() == pytest.approx(0.1055497, rel=1e-5)
    student, teacher = F.normalize(student), F.normalize(teacher)
    assert distance_loss(student, teacher).item() == pytest.approx(0.1063790, rel=1e-5)
    assert angle_loss(student, teacher).item() == pytest.approx(0.0520365, rel=1e-5)


@pytest.mark.parametrize(('loss', 'loops'), [(distance_loss, distance_loops), (angle_loss, angle_loops)])
@pytest.mark.parametrize('samples', [1, 2, 6])
def test_the_formulas_as_plain_loops(loss, loops, samples):
    """Two samples of six are the same one."""
    student, teacher = torch.randn(samples, 5, dtype=torch.float64), torch.randn(samples, 3, dtype=torch.float64)
    student[-1] = student[samples // 2]
    assert loss(student, teacher).item() == pytest.approx(loops(student, teacher), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize('loss', [distance_loss, angle_loss])
def test_zero_up_to_place_scale_and_rotation(loss):
    rows = torch.randn(6, 5, dtype=torch.float64)
    turned, _ = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))
    assert loss(rows, 3 * rows @ turned + 1).item() == pytest.approx(0, abs=1e-20)


@pytest.mark.parametrize('loss', [distance_loss, angle_loss])
@pytest.mark.parametrize('samples', [1, 2, 5])
def test_few_or_equal_samples_are_finite_and_differentiable(loss, samples):
    for student in (torch.zeros(samples, 5), torch.randn(1, 5).repeat(samples, 1), torch.randn(samples, 5)):
        student.requires_grad_()
        found = loss(student, torch.randn(samples, 7))
        found.backward()
        assert torch.isfinite(found)
        assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize('loss', [distance_loss, angle_loss])
def test_the_gradient_reaches_the_student_alone(loss):
    student, teacher = (torch.randn(5, 4, requires_grad=True) for _ in range(2))
    loss(student, teacher).backward()
    assert student.grad.any()
    assert teacher.grad is None


@pytest.mark.parametrize('loss', [distance_loss, angle_loss])
def test_the_gradient_is_that_of_differences(loss):
    student, teacher = torch.randn(4, 3, dtype=torch.float64, requires_grad=True), torch.randn(4, 6).double()
    assert torch.autograd.gradcheck(lambda rows: loss(rows, teacher), student)
