import pytest
import torch

from mmkd.distill import distill
from mmkd.distillers.generic.irg import edge_loss, transformation_loss
from mmkd.errors import ConfigError
from mmkd.testing import models, segmentors


def edge_loops(student, teacher):
    found = []
    for rows in (student.tolist(), teacher.tolist()):
        squares = [sum((a - b) ** 2 for a, b in zip(x, y)) for x in rows for y in rows]
        found.append([each / (max(squares) or 1) for each in squares])
    return sum((a - b) ** 2 for a, b in zip(*found)) / len(found[0])


def move_loops(student, teacher):
    """The longer one of each pair here has twice the other's channels."""
    found = []
    for before, after in (student, teacher):
        squares = []
        for x, y in zip(before.tolist(), after.tolist()):
            if len(x) > len(y):
                x = [(a + b) / 2 for a, b in zip(x[::2], x[1::2])]
            if len(y) > len(x):
                y = [(a + b) / 2 for a, b in zip(y[::2], y[1::2])]
            squares.append(sum((a - b) ** 2 for a, b in zip(x, y)))
        found.append([each / max(squares) for each in squares])
    return sum((a - b) ** 2 for a, b in zip(*found)) / len(found[0])


def rows(*shapes):
    return tuple(torch.randn(*shape, dtype=torch.float64) for shape in shapes)


@pytest.mark.parametrize('samples', [1, 2, 6])
def test_edges_as_plain_loops(samples):
    student, teacher = rows((samples, 5), (samples, 3))
    assert edge_loss(student, teacher).item() == pytest.approx(edge_loops(student, teacher), rel=1e-9, abs=1e-15)


@pytest.mark.parametrize('channels', [(4, 4, 6, 6), (4, 8, 6, 6), (8, 4, 3, 6)])
def test_transformations_as_plain_loops(channels):
    each = rows(*((6, c) for c in channels))
    student, teacher = each[:2], each[2:]
    found = transformation_loss(student, teacher).item()
    assert found == pytest.approx(move_loops(student, teacher), rel=1e-6)


def test_zero_for_equal_inputs_and_for_others_of_another_scale():
    first, second = rows((6, 4), (6, 8))
    assert edge_loss(first, 3 * first + 1).item() == pytest.approx(0, abs=1e-20)
    assert transformation_loss((first, second), (-2 * first, -2 * second)).item() == pytest.approx(0, abs=1e-20)


def test_equal_samples_are_finite_and_the_gradient_reaches_the_student_alone():
    for student in (torch.zeros(4, 5, requires_grad=True), torch.randn(4, 5, requires_grad=True)):
        teacher = torch.randn(4, 5, requires_grad=True)
        loss = edge_loss(student, teacher) + transformation_loss((student, 2 * student), (teacher, teacher**2))
        loss.backward()
        assert torch.isfinite(student.grad).all()
        assert teacher.grad is None
    assert student.grad.any()


@pytest.mark.parametrize('method', ['IRG', 'FSP', 'ReviewKD', 'AFD'])
def test_a_single_level_is_an_error(method):
    student, teacher = (models.build(segmentors.pspnet(), seed=0) for _ in range(2))
    with pytest.raises(ConfigError, match=r"layer='backbone.layer4': a single level.*name two layers"):
        distill(student, teacher, dict(it=dict(type=method, layer='backbone.layer4')))
