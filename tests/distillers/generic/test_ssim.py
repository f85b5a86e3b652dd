import math

import pytest
import torch

from mmkd.distillers.generic.ssim import (
    SSIM,
    structural_loss,
    structural_similarity,
    unit_range,
    window_weights,
)
from mmkd.errors import ConfigError
from mmkd.hosts.running import probe
from mmkd.taps import Taps
from mmkd.testing import detectors, models


def similarity_plain_loops(student, teacher, window, sigma):
    """Of one channel of one image, (H, W), position by position."""
    height, width = student.shape
    found = [[0.0] * width for _ in range(height)]
    for y in range(height):
        for x in range(width):
            weights, values = [], []
            for v in range(height):
                for u in range(width):
                    if max(abs(v - y), abs(u - x)) <= window // 2:
                        weights.append(math.exp(-((v - y) ** 2 + (u - x) ** 2) / (2 * sigma**2)))
                        values.append((student[v, u].item(), teacher[v, u].item()))
            share = [each / sum(weights) for each in weights]
            s, t = (sum(w * pair[side] for w, pair in zip(share, values)) for side in (0, 1))
            ss, tt = (sum(w * (pair[i] - m) ** 2 for w, pair in zip(share, values)) for i, m in ((0, s), (1, t)))
            st = sum(w * (a - s) * (b - t) for w, (a, b) in zip(share, values))
            c1, c2 = 1e-4, 9e-4
            found[y][x] = (2 * s * t + c1) * (2 * st + c2) / ((s * s + t * t + c1) * (ss + tt + c2))
    return torch.tensor(found, dtype=torch.float64)


def test_the_similarity_as_plain_loops():
    student, teacher = torch.rand(2, 2, 3, 7, 13, dtype=torch.float64)
    for window, sigma in ((11, 1.5), (3, 0.8)):
        expected = torch.stack(
            [
                torch.stack([similarity_plain_loops(s, t, window, sigma) for s, t in zip(*image)])
                for image in zip(student, teacher)
            ]
        )
        torch.testing.assert_close(structural_similarity(student, teacher, window, sigma), expected)


def test_the_loss_as_plain_loops():
    student, teacher = torch.randn(2, 2, 2, 4, 5, dtype=torch.float64)
    total = 0.0
    for image in range(2):
        ranges = []
        for each in (student[image], teacher[image]):
            values = each.flatten().tolist()
            ranges.append((each - min(values)) / (max(values) - min(values)))
        for s, t in zip(*ranges):
            total += sum((1 - each) / 2 for each in similarity_plain_loops(s, t, 11, 1.5).flatten().tolist())
    assert structural_loss(student, teacher).item() == pytest.approx(total / student.numel(), rel=1e-9)


def test_values_by_hand():
    """Of constant maps only the level is left; of a map and its opposite around one mean the structure turns its sign."""
    dark, light = (torch.full((1, 1, 4, 4), level, dtype=torch.float64) for level in (0.2, 0.6))
    expected = (2 * 0.2 * 0.6 + 1e-4) / (0.04 + 0.36 + 1e-4)
    torch.testing.assert_close(structural_similarity(dark, light), torch.full_like(dark, expected))
    board = (torch.arange(12)[:, None] + torch.arange(12)) % 2
    board = board.double()[None, None]
    found = structural_similarity(board, 1 - board)
    assert found.min() > -1
    assert found.max() < -0.9
    assert structural_loss(board, 1 - board).item() == pytest.approx(1, abs=0.02)


def test_windows_sum_to_one_and_end_at_the_border():
    weights = window_weights(14, torch.zeros(1, dtype=torch.float64))
    torch.testing.assert_close(weights.sum(1), torch.ones(14, dtype=torch.float64))
    assert [int((row > 0).sum()) for row in weights] == [6, 7, 8, 9, 10, *[11] * 4, 10, 9, 8, 7, 6]
    assert weights[6, 7] / weights[6, 6] == pytest.approx(math.exp(-0.5 / 1.5**2))
    assert window_weights(1, torch.zeros(1)).tolist() == [[1.0]]


def test_equal_maps_and_the_scale_and_offset_of_a_map():
    student, teacher = torch.randn(2, 2, 3, 9, 8, dtype=torch.float64)
    assert structural_loss(teacher, teacher).item() == 0
    assert structural_loss(teacher.float(), teacher.float()).item() == 0
    expected = structural_loss(student, teacher)
    scale, offset = torch.rand(2, 2, 1, 1, 1, dtype=torch.float64) + 0.1
    torch.testing.assert_close(structural_loss(scale * student + offset, teacher), expected)
    torch.testing.assert_close(structural_loss(student, scale * teacher + offset), expected)
    # of one channel alone they do matter: levels are compared
    assert structural_loss(teacher + torch.tensor([3.0, 0, 0]).view(3, 1, 1), teacher) > 0.01


@pytest.mark.parametrize('value', [0.0, 3.1, -1e4])
def test_a_constant_map_is_zero_with_a_finite_gradient(value):
    student, teacher = torch.randn(2, 2, 3, 8, 8)
    student[1] = value
    student[1, 0, 0, 0] = torch.nextafter(student[1, 0, 0, 0], torch.tensor(torch.inf))
    teacher[0] = value
    student.requires_grad_()
    loss = structural_loss(student, teacher)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()
    assert (student.grad[1] == 0).all()
    assert student.grad[0].abs().sum() > 0
    assert (unit_range(student)[1] == 0).all()


@pytest.mark.parametrize('size', [(1, 1), (1, 5), (3, 1)])
def test_a_map_smaller_than_the_window(size):
    student = torch.randn(2, 4, *size, requires_grad=True)
    structural_loss(student, torch.randn(2, 4, *size)).backward()
    assert torch.isfinite(student.grad).all()


def test_the_gradient_is_that_of_the_formula_and_leads_to_the_teacher():
    student, teacher = torch.randn(2, 1, 2, 4, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: structural_loss(s, teacher), student.clone().requires_grad_())
    own = student.clone().requires_grad_()
    optimizer = torch.optim.Adam([own], 0.05)
    first = structural_loss(own, teacher).item()
    for _ in range(200):
        optimizer.zero_grad()
        structural_loss(own, teacher).backward()
        optimizer.step()
    assert structural_loss(own, teacher).item() < 0.05 * first


def test_an_overflow_stays_one():
    student, teacher = torch.randn(2, 2, 3, 8, 8)
    student[0, 0, 0, 0] = torch.inf
    assert not torch.isfinite(structural_loss(student, teacher))


def test_the_sum_over_levels_reaches_student_and_adapters():
    student, teacher = models.build(detectors.retinanet(), seed=0), models.build(detectors.retinanet(24), seed=1)
    distiller = SSIM('neck', loss_weight=2.0)
    distiller.setup(probe(student, ['neck']), probe(teacher, ['neck']))
    taps = []
    for model in (student, teacher):
        with Taps(model, ['neck']) as read:
            model.extract_feat(torch.ones(2, 3, 96, 128).normal_(generator=torch.Generator().manual_seed(0)))
        taps.append(read)
    pairs = distiller.levels(*taps)
    loss = distiller(*taps, None)['loss']
    torch.testing.assert_close(loss, 2 * sum(structural_loss(pair.student, pair.teacher) for pair in pairs))
    loss.backward()
    assert len(pairs) == 3
    assert all(each.grad.abs().sum() > 0 for each in distiller.parameters() if each.dim() == 4)
    assert student.neck.lateral_convs[0].conv.weight.grad.abs().sum() > 0
    assert all(each.grad is None for each in teacher.parameters())


@pytest.mark.parametrize('options', [dict(match='size'), dict(loss_weight='10')])
def test_options_out_of_range_are_errors(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        SSIM('neck', **options)
