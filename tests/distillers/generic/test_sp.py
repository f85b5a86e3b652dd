import math

import pytest
import torch

from mmkd.distillers.generic.sp import similarity_loss
from mmkd.testing.closed_form import closed_form_inputs


def loops(student, teacher):
    def similarities(rows):
        products = [[sum(a * b for a, b in zip(x, y)) for y in rows.tolist()] for x in rows.tolist()]
        return [[each / math.sqrt(sum(v * v for v in row)) for each in row] for row in products]

    own, other = similarities(student), similarities(teacher)
    return sum((a - b) ** 2 for x, y in zip(own, other) for a, b in zip(x, y)) / len(own) ** 2


def test_the_value_of_public_code():
    """mdistiller's."""
    student, teacher = closed_form_inputs((4, 3, 2, 2), (4, 7, 2, 2))
    assert similarity_loss(student.flatten(1), teacher.flatten(1)).item() == pytest.approx(0.0985162, rel=1e-5)


@pytest.mark.parametrize('samples', [1, 2, 6])
def test_the_formula_as_plain_loops(samples):
    student, teacher = torch.randn(samples, 5, dtype=torch.float64), torch.randn(samples, 3, dtype=torch.float64)
    assert similarity_loss(student, teacher).item() == pytest.approx(loops(student, teacher), rel=1e-10, abs=1e-20)


def test_zero_up_to_a_factor_and_a_rotation():
    rows = torch.randn(6, 5, dtype=torch.float64)
    turned, _ = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))
    assert similarity_loss(rows, -3 * rows @ turned).item() == pytest.approx(0, abs=1e-20)


def test_rows_of_zeros_are_finite_and_differentiable():
    rows = torch.zeros(4, 5, requires_grad=True)
    similarity_loss(rows, torch.randn(4, 7)).backward()
    assert torch.isfinite(rows.grad).all()


def test_the_gradient_reaches_the_student_alone():
    student, teacher = (torch.randn(4, 5, requires_grad=True) for _ in range(2))
    similarity_loss(student, teacher).backward()
    assert student.grad.any()
    assert teacher.grad is None
