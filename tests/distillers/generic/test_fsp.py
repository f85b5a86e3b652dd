import pytest
import torch

from mmkd.distillers.generic.fsp import flow, flow_loss
from mmkd.testing.closed_form import closed_form_inputs


def loops(first, second):
    """Of maps of one size."""
    x, y = first.flatten(2).tolist(), second.flatten(2).tolist()
    return [[[sum(a * b for a, b in zip(c, d)) / len(c) for d in y[i]] for c in x[i]] for i in range(len(x))]


def test_the_value_of_public_code():
    """RepDistiller's, average pooling."""
    first, second = closed_form_inputs((2, 3, 8, 8)), closed_form_inputs((2, 4, 4, 4))
    found = flow_loss((first[0], second[0]), (first[1], second[1]))
    assert found.item() == pytest.approx(0.1534411, rel=1e-5)


def test_the_formula_as_plain_loops():
    maps = [torch.randn(2, c, 3, 4, dtype=torch.float64) for c in (3, 5, 3, 5)]
    for index in (0, 2):
        expected = torch.tensor(loops(*maps[index : index + 2]), dtype=torch.float64)
        torch.testing.assert_close(flow(*maps[index : index + 2]), expected)
    own, other = (torch.tensor(loops(*maps[i : i + 2])).flatten().tolist() for i in (0, 2))
    expected = sum((a - b) ** 2 for a, b in zip(own, other)) / len(own)
    assert flow_loss(tuple(maps[:2]), tuple(maps[2:])).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize('sizes', [((8, 12), (4, 6)), ((4, 6), (8, 12)), ((8, 4), (4, 8))])
def test_the_larger_map_is_averaged(sizes):
    first, second = (torch.randn(1, 2, *size) for size in sizes)
    size = [min(sides) for sides in zip(*sizes)]
    pooled = [torch.nn.functional.adaptive_avg_pool2d(each, size) for each in (first, second)]
    torch.testing.assert_close(flow(first, second), flow(*pooled))


def test_zero_for_equal_inputs_and_the_gradient_reaches_the_student_alone():
    student, teacher = ([torch.randn(2, c, 4, 4, requires_grad=True) for c in (3, 5)] for _ in range(2))
    assert flow_loss(tuple(student), tuple(student)) == 0
    flow_loss(tuple(student), tuple(teacher)).backward()
    assert all(each.grad.any() for each in student)
    assert all(each.grad is None for each in teacher)
