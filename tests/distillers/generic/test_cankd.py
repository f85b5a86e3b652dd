import math

import pytest
import torch

from mmkd.distillers.generic.cankd import CanKD, NonLocal, attended_loss, cross_attention
from mmkd.errors import ConfigError
from mmkd.hosts.running import probe
from mmkd.taps import Taps
from mmkd.testing import detectors, models
from mmkd.testing.closed_form import closed_form_inputs


def attention_plain_loops(query, key, value):
    """Of one image: nested lists, for each pair of positions."""
    (size, *shape), positions = query.shape, key[0].numel()
    q, k, v = (each.flatten(1).tolist() for each in (query, key, value))
    found = [[0.0] * len(q[0]) for _ in range(size)]
    for i in range(len(q[0])):
        for j in range(positions):
            similarity = sum(q[d][i] * k[d][j] for d in range(size)) / positions
            for d in range(size):
                found[d][i] += similarity * v[d][j]
    return torch.tensor(found, dtype=torch.float64).view(size, *shape)


def loss_plain_loops(student, teacher):
    total = 0.0
    for s_image, t_image in zip(student, teacher):
        for maps in zip(s_image, t_image):
            rows = []
            for each in maps:
                values = each.flatten().tolist()
                mean = sum(values) / len(values)
                variance = sum((value - mean) ** 2 for value in values) / len(values)
                rows.append([(value - mean) / math.sqrt(variance + 1e-5) for value in values])
            total += sum((s - t) ** 2 for s, t in zip(*rows))
    return total / student.numel() / 2


def test_the_attention_as_plain_loops():
    query = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    key, value = torch.randn(2, 2, 3, 2, 3, dtype=torch.float64)
    expected = torch.stack([attention_plain_loops(*each) for each in zip(query, key, value)])
    torch.testing.assert_close(cross_attention(query, key, value), expected)


def test_the_loss_as_plain_loops():
    student, teacher = torch.randn(2, 2, 3, 4, 6, dtype=torch.float64)
    assert attended_loss(student, teacher).item() == pytest.approx(loss_plain_loops(student, teacher), rel=1e-9)
    assert attended_loss(teacher, teacher).item() == 0


def test_the_values_of_the_authors_code():
    """Its class NLKD_IN_Loss (Apache-2.0, commit 1a75718) on the closed-form inputs, weights alike."""
    student, teacher = closed_form_inputs((2, 6, 4, 6))
    block = NonLocal(6)
    assert attended_loss(block(student, teacher), teacher).item() == pytest.approx(0.9774549, rel=1e-5)
    with torch.no_grad():
        for index, part in enumerate((block.query, block.key, block.value, block.output, block.norm)):
            for parameter in (part.weight, part.bias):
                parameter.copy_(0.1 * closed_form_inputs(parameter.shape)[index % 2])
    assert attended_loss(block(student, teacher), teacher).item() == pytest.approx(0.9738070, rel=1e-5)


def test_a_new_block_changes_nothing_and_sees_the_teacher_once_it_is_trained():
    student, teacher, other = torch.randn(3, 2, 6, 5, 7)
    block = NonLocal(6)
    assert torch.equal(block(student, teacher), student)
    torch.nn.init.ones_(block.norm.weight)
    assert not torch.allclose(block(student, teacher), block(student, other), atol=1e-2)


def test_a_single_image_of_one_position():
    student, teacher = torch.randn(2, 1, 6, 1, 1)
    block = NonLocal(6)
    torch.nn.init.ones_(block.norm.bias)
    torch.testing.assert_close(block(student, teacher), student + 1)


def test_scale_and_offset_of_a_channel_of_an_image_change_nothing():
    student, teacher = torch.randn(2, 2, 3, 8, 8, dtype=torch.float64)
    scale, offset = torch.rand(2, 2, 3, 1, 1, dtype=torch.float64) + 0.5
    expected = attended_loss(student, teacher)
    torch.testing.assert_close(attended_loss(scale * student + offset, teacher), expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(attended_loss(student, scale * teacher + offset), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize('size', [(1, 1), (1, 5), (3, 1)])
def test_a_map_of_one_row_or_position_is_finite(size):
    student = torch.randn(2, 4, *size, requires_grad=True)
    block = NonLocal(4)
    torch.nn.init.ones_(block.norm.weight)
    attended_loss(block(student, torch.randn(2, 4, *size)), torch.randn(2, 4, *size)).backward()
    assert torch.isfinite(student.grad).all()


def test_no_matrix_of_all_pairs_of_positions_is_made():
    """128 x 128 positions of both would be a matrix of 64 MiB in float32; the context is one of 2 x 2."""
    query, key = torch.randn(1, 2, 128, 128), torch.randn(1, 2, 64, 64)
    sizes = []

    class Sizes(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            found = function(*args, **(kwargs or {}))
            sizes.extend(each.numel() for each in (found,) if isinstance(each, torch.Tensor))
            return found

    with Sizes():
        cross_attention(query, key, key)
    assert sizes
    assert max(sizes) <= query.numel()


def test_levels_have_a_block_each_and_all_are_trained():
    student, teacher = models.build(detectors.retinanet(), seed=0), models.build(detectors.retinanet(24), seed=1)
    distiller = CanKD('neck', loss_weight=2.0)
    distiller.setup(probe(student, ['neck']), probe(teacher, ['neck']))
    taps = []
    for model in (student, teacher):
        with Taps(model, ['neck']) as read:
            model.extract_feat(torch.ones(2, 3, 96, 128).normal_(generator=torch.Generator().manual_seed(0)))
        taps.append(read)
    pairs = distiller.levels(*taps)
    expected = 2 * sum(attended_loss(pair.student, pair.teacher) for pair in pairs)
    torch.testing.assert_close(distiller(*taps, None)['loss'], expected)
    for block in distiller.blocks:
        torch.nn.init.ones_(block.norm.weight)
    distiller(*taps, None)['loss'].backward()
    assert len(distiller.blocks) == 3
    assert all(each.grad.abs().sum() > 0 for each in distiller.parameters() if each.dim() == 4)
    assert student.neck.lateral_convs[0].conv.weight.grad.abs().sum() > 0
    assert all(each.grad is None for each in teacher.parameters())
    assert not list(distiller.buffers())


@pytest.mark.parametrize('options', [dict(match='size'), dict(loss_weight='10')])
def test_options_out_of_range_are_errors(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        CanKD('neck', **options)
