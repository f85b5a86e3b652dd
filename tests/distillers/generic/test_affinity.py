import math

import pytest
import torch

from mmkd.distillers.generic.affinity import Affinity, affinity_loss
from mmkd.errors import ConfigError
from mmkd.hosts.running import probe
from mmkd.testing import models, segmentors
from mmkd.testing.closed_form import closed_form_inputs


def plain_loops(student, teacher):
    total = 0.0
    for s_image, t_image in zip(student.flatten(2).tolist(), teacher.flatten(2).tolist()):
        for s, t in zip(s_image, t_image):
            u, v = ([each / math.sqrt(sum(k * k for k in row)) for each in row] for row in (s, t))
            squares = sum((u[i] * u[j] - v[i] * v[j]) ** 2 for i in range(len(u)) for j in range(len(u)))
            total += math.sqrt(squares) / len(u)
    return total / len(student)


def test_the_formula_as_plain_loops():
    student, teacher = torch.randn(2, 2, 3, 4, 5, dtype=torch.float64)
    assert affinity_loss(student, teacher).item() == pytest.approx(plain_loops(student, teacher), rel=1e-9)


def test_the_value_of_torchdistill():
    """Its class AffinityLoss (MIT, 1.1.5) on the closed-form inputs."""
    assert affinity_loss(*closed_form_inputs((2, 6, 4, 6))).item() == pytest.approx(0.3515788, rel=1e-5)


def test_a_factor_of_a_channel_changes_nothing_and_orthogonal_ones_are_furthest_apart():
    student, teacher = torch.randn(2, 2, 3, 4, 6, dtype=torch.float64)
    factor = torch.randn(2, 3, 1, 1, dtype=torch.float64)
    torch.testing.assert_close(affinity_loss(factor * student, teacher), affinity_loss(student, teacher))
    assert affinity_loss(factor * teacher, teacher) < 1e-12
    one, other = torch.eye(2).view(2, 1, 1, 1, 2)
    assert affinity_loss(one, other).item() == pytest.approx(math.sqrt(2) / 2)


def test_channels_of_zeros_and_equal_ones_have_finite_gradients():
    student = torch.randn(1, 3, 4, 4)
    student[:, 0] = 0
    teacher = student.clone()
    teacher[:, 2] = 0
    student.requires_grad_(True)
    affinity_loss(student, teacher).backward()
    assert torch.isfinite(student.grad).all()


def test_no_matrix_of_all_pairs_of_positions_is_made():
    found = torch.randn(1, 2, 256, 256, requires_grad=True)  # which would be one of 16 GiB
    affinity_loss(found, torch.randn(1, 2, 256, 256)).backward()


def test_a_student_of_other_channels_has_an_adapter():
    student, teacher = models.build(segmentors.pspnet(), seed=0), models.build(segmentors.pspnet(24), seed=1)
    layer = 'decode_head.bottleneck'
    distiller = Affinity(layer)
    distiller.setup(probe(student, [layer]), probe(teacher, [layer]))
    assert [each.conv.out_channels for each in distiller.levels.adapters] == [24]


@pytest.mark.parametrize('options', [dict(match='size'), dict(loss_weight='10')])
def test_options_out_of_range_are_errors(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        Affinity('neck', **options)
