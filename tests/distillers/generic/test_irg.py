import pytest
import torch

from mmkd.distill import distill
from mmkd.distillers.generic.irg import edge_loss, transformation_loss
from mmkd.errors import ConfigError
from mmkd.testing import models, segmentors
from mmkd.testing.batches import random_batch


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


def test_transformations_of_maps_as_plain_loops():
    """From 2 channels of 4x4 positions to 4 of 2x2: channels are averaged over channels, positions over positions."""
    maps = [*rows((3, 2, 4, 4), (3, 4, 2, 2)), *rows((3, 2, 4, 4), (3, 4, 2, 2))]
    found = []
    for before, after in (maps[:2], maps[2:]):
        squares = []
        for x, y in zip(before.tolist(), after.tolist()):
            cells = [(c, i, j) for c in range(2) for i in range(2) for j in range(2)]
            squares.append(0.0)
            for c, i, j in cells:
                own = sum(x[c][2 * i + v][2 * j + u] for v in range(2) for u in range(2)) / 4
                squares[-1] += (own - (y[2 * c][i][j] + y[2 * c + 1][i][j]) / 2) ** 2
        found.append([each / max(squares) for each in squares])
    expected = sum((a - b) ** 2 for a, b in zip(*found)) / 3
    assert transformation_loss(tuple(maps[:2]), tuple(maps[2:])).item() == pytest.approx(expected, rel=1e-6)


def test_images_of_large_maps():
    """Of a million numbers to half a million: a matrix of both would be 2 TB."""
    student = (torch.randn(2, 256, 64, 64, requires_grad=True), torch.randn(2, 512, 32, 32))
    teacher = (torch.randn(2, 256, 64, 64), torch.randn(2, 512, 64, 64))
    loss = transformation_loss(student, teacher)
    loss.backward()
    assert torch.isfinite(student[0].grad).all()


def test_a_training_step_between_images(tmp_path):
    config = segmentors.pspnet(base=16)
    teacher = dict(config=config, checkpoint=models.save_weights(config, tmp_path / 'teacher.pth'))
    student = models.build(segmentors.pspnet(), seed=0)
    entry = dict(type='IRG', layer=['backbone.layer1', 'backbone.layer3', 'backbone.layer4'], between='images')
    model = distill(student, teacher, dict(irg=entry)).train()
    model.sources['teacher'].load()
    data = model.data_preprocessor(random_batch(model, (2, 3, 64, 96)), True)
    losses = model(**data, mode='loss')
    sum(losses[f'irg.loss_{key}'] for key in ('edge', 'transformation')).backward()
    assert next(model.backbone.parameters()).grad.any()


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
