import math

import pytest
import torch

from mmkd.distillers.generic.cwd import channel_wise_divergence
from mmkd.testing.closed_form import closed_form_inputs


def plain_loops(student, teacher, tau):
    """The formula, position by position, in float64."""
    batch, channels, height, width = student.shape
    total = 0.0
    for b in range(batch):
        for c in range(channels):
            logits = [(student[b, c].flatten().tolist(), 0), (teacher[b, c].flatten().tolist(), 1)]
            p = {}
            for values, which in logits:
                exponentials = [math.exp(value / tau) for value in values]
                p[which] = [each / sum(exponentials) for each in exponentials]
            total += sum(p[1][i] * math.log(p[1][i] / p[0][i]) for i in range(height * width))
    return tau**2 * total / (batch * channels)


def test_the_value_that_two_public_implementations_give():
    student, teacher = closed_form_inputs((2, 5, 4, 6))
    assert channel_wise_divergence(student, teacher, tau=1.0).item() == pytest.approx(1.2277164, rel=1e-5)


@pytest.mark.parametrize('tau', [0.5, 1.0, 4.0])
def test_the_formula_as_plain_loops(tau):
    student, teacher = torch.randn(2, 2, 3, 4, 5, dtype=torch.float64)
    assert channel_wise_divergence(student, teacher, tau).item() == pytest.approx(
        plain_loops(student, teacher, tau), rel=1e-6
    )


def test_zero_for_equal_inputs():
    feature = torch.randn(2, 3, 8, 8)
    assert channel_wise_divergence(feature, feature).item() == pytest.approx(0, abs=1e-7)


def test_a_constant_added_to_a_channel_changes_nothing():
    student, teacher = torch.randn(2, 2, 3, 8, 8)
    offset = 5 * torch.randn(2, 3, 1, 1)
    expected = channel_wise_divergence(student, teacher)
    torch.testing.assert_close(channel_wise_divergence(student + offset, teacher), expected)
    torch.testing.assert_close(channel_wise_divergence(student, teacher + offset), expected)


def test_a_batch_of_one_weighs_as_much_as_a_larger_one():
    student, teacher = torch.randn(2, 1, 3, 8, 8)
    one = channel_wise_divergence(student, teacher)
    torch.testing.assert_close(channel_wise_divergence(student.repeat(4, 1, 1, 1), teacher.repeat(4, 1, 1, 1)), one)


def test_channels_last_inputs_and_extreme_logits():
    student, teacher = torch.randn(2, 2, 3, 8, 8)
    expected = channel_wise_divergence(student, teacher)
    last = channel_wise_divergence(*(each.contiguous(memory_format=torch.channels_last) for each in (student, teacher)))
    torch.testing.assert_close(last, expected)
    student = student.clone()
    student[0, 0, 0, 0] += 200
    student.requires_grad_()
    loss = channel_wise_divergence(student, teacher)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()


def test_the_gradient_reaches_the_student_and_not_the_teacher():
    student, teacher = torch.randn(2, 2, 3, 8, 8).requires_grad_(), torch.randn(2, 2, 3, 8, 8).requires_grad_()
    student, teacher = student[0], teacher[0]
    student.retain_grad(), teacher.retain_grad()
    channel_wise_divergence(student, teacher).backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None
