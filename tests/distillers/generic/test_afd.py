import math

import pytest
import torch

from mmkd.distillers.generic.afd import AFD, Matching, matching_loss
from mmkd.errors import ConfigError


def energy(level, b):
    """Of an image, position by position, of length 1."""
    v = [sum(x * x for x in position) for position in level[b].flatten(1).t().tolist()]
    length = math.sqrt(sum(x * x for x in v))
    return [x / length for x in v]


def test_the_loss_as_plain_loops():
    """Levels of other channels, of one size."""
    student = [torch.randn(2, c, 3, 4, dtype=torch.float64) for c in (2, 5, 4)]
    teacher = [torch.randn(2, c, 3, 4, dtype=torch.float64) for c in (6, 3)]
    shares = torch.rand(2, 2, 3, dtype=torch.float64).softmax(2)
    expected = 0.0
    for b in range(2):
        for t, other in enumerate(teacher):
            for s, own in enumerate(student):
                squares = [(x - y) ** 2 for x, y in zip(energy(own, b), energy(other, b))]
                expected += shares[b, t, s].item() * sum(squares) / len(squares) / 2
    assert matching_loss(student, teacher, shares).item() == pytest.approx(expected, rel=1e-9)


def test_a_larger_level_is_averaged_to_the_teachers_size():
    small = torch.rand(2, 3, 4, 6)
    large = small.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert matching_loss([large], [small], torch.ones(2, 1, 1)).item() == pytest.approx(0, abs=1e-12)


def test_shares_as_plain_steps():
    torch.manual_seed(0)
    matching = Matching([2, 5, 4], [6, 3], 8).double()
    for norm in matching.norms:
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    student = [torch.randn(2, c, 3, 4, dtype=torch.float64) for c in (2, 5, 4)]
    teacher = [torch.randn(2, c, 3, 4, dtype=torch.float64) for c in (6, 3)]
    found = matching(student, teacher)
    for b in range(2):
        for t in range(2):
            q = matching.queries[t](teacher[t][b].mean((1, 2)))
            scores = []
            for s in range(3):
                k = matching.keys[s](student[s][b].mean((1, 2))).clamp(min=0)
                place = matching.places[3 + t] @ matching.places[s]
                scores.append((q @ matching.norms[t](matching.bilinear[t] @ k) + place) / math.sqrt(8))
            torch.testing.assert_close(found[b, t], torch.stack(scores).softmax(0))


def test_matrices_begin_as_xaviers_and_scores_with_a_deviation_of_one():
    torch.manual_seed(0)
    channels = 128
    matching = Matching([16, 32, 64], [16, 32, 64, 128], channels)
    for matrix in matching.bilinear:
        assert matrix.std().item() == pytest.approx(channels**-0.5, rel=0.05)
    levels, others = ([torch.randn(256, c, 1, 1) for c in widths] for widths in ((16, 32, 64), (16, 32, 64, 128)))
    scores = matching(levels, others).log()
    scores = scores - scores.mean(2, keepdim=True)
    assert scores.square().sum(2).mean().item() / 2 == pytest.approx(1, rel=0.3)  # of 3 values and their mean


def test_zero_where_only_equal_levels_are_matched():
    level = torch.randn(2, 3, 4, 5, requires_grad=True)
    shares = torch.tensor([[[1.0, 0.0]]]).expand(2, -1, -1)
    assert matching_loss([level, level**2], [-2 * level], shares).item() == pytest.approx(0, abs=1e-12)


def test_the_gradient_reaches_student_and_matching_and_not_the_teacher():
    matching = Matching([3, 5], [4], 8)
    student = [torch.randn(1, c, 6, 6, requires_grad=True) for c in (3, 5)]
    teacher = [torch.randn(1, 4, 4, 4, requires_grad=True)]
    targets = [each.detach() for each in teacher]
    matching_loss(student, teacher, matching(student, targets)).backward()
    assert all(each.grad.any() for each in student)
    assert all(torch.isfinite(each.grad).all() for each in matching.parameters())
    assert teacher[0].grad is None


@pytest.mark.parametrize('options', [dict(channels=0), dict(layer=None), dict(teacher_layer=3)])
def test_options_out_of_range_are_errors(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        AFD(**{'layer': 'neck', **options})
