import math

import pytest
import torch
from mmcv.cnn import NonLocal2d

from mmkd.distillers.generic.cankd import NonLocal
from mmkd.distillers.generic.fkd import FKD, FKDLevel, attention, common_attention, distance
from mmkd.errors import ConfigError
from mmkd.hosts.running import probe
from mmkd.taps import Taps
from mmkd.testing import detectors, models
from mmkd.testing.closed_form import closed_form_inputs

TERMS = ['loss_feature', 'loss_channel', 'loss_spatial', 'loss_relation']


def filled(module):
    """A module in float64 whose parameters are neither 0 nor random."""
    with torch.no_grad():
        for index, parameter in enumerate(module.parameters()):
            parameter.copy_(0.2 * closed_form_inputs(parameter.shape)[index % 2])
    return module.double()


def attention_plain_loops(feature, tau):
    """Of one image, (C, H, W): position to attention."""
    channels, height, width = feature.shape
    means = {
        (y, x): sum(abs(feature[c, y, x].item()) for c in range(channels)) / channels
        for y in range(height)
        for x in range(width)
    }
    total = sum(math.exp(each / tau) for each in means.values())
    return {cell: len(means) * math.exp(each / tau) / total for cell, each in means.items()}


def distances_plain_loops(block, student, teacher, tau):
    """The first three of a level, image by image, channel by channel, position by position."""
    count, channels, height, width = teacher.shape
    own = student.shape[1]
    cells = [(y, x) for y in range(height) for x in range(width)]
    feature = channel = spatial = 0.0
    weight, bias = block.feature.weight[:, :, 0, 0].tolist(), block.feature.bias.tolist()
    linear, added = block.channel.weight.tolist(), block.channel.bias.tolist()
    kernel, offset = block.spatial.weight[0, 0].tolist(), block.spatial.bias.item()
    for b in range(count):
        s, t = student[b].tolist(), teacher[b].tolist()
        both = [attention_plain_loops(each[b], tau) for each in (student, teacher)]
        for y, x in cells:
            mask = (both[0][y, x] + both[1][y, x]) / 2
            for c in range(channels):
                adapted = sum(weight[c][k] * s[k][y][x] for k in range(own)) + bias[c]
                feature += mask * (t[c][y][x] - adapted) ** 2
        means = [sum(s[k][y][x] for y, x in cells) / len(cells) for k in range(own)]
        for c in range(channels):
            adapted = sum(linear[c][k] * means[k] for k in range(own)) + added[c]
            channel += (sum(t[c][y][x] for y, x in cells) / len(cells) - adapted) ** 2
        flat = {(y, x): sum(s[k][y][x] for k in range(own)) / own for y, x in cells}
        for y, x in cells:
            adapted = offset + sum(
                kernel[i][j] * flat.get((y + i - 1, x + j - 1), 0.0) for i in range(3) for j in range(3)
            )
            spatial += (sum(t[c][y][x] for c in range(channels)) / channels - adapted) ** 2
    return [math.sqrt(each) for each in (feature, channel, spatial)]


@pytest.mark.parametrize('tau', [0.5, 2.0])
def test_a_level_as_plain_loops(tau):
    student, teacher = (each.double() for each in closed_form_inputs((2, 3, 4, 6), (2, 5, 4, 6)))
    block = filled(FKDLevel(3, 5))
    *found, relation = block(student, teacher, tau)
    assert [each.item() for each in found] == pytest.approx(distances_plain_loops(block, student, teacher, tau))
    expected = block.relation(of_mmcv(block.non_local, student)) - of_mmcv(block.teacher_non_local, teacher)
    torch.testing.assert_close(relation, expected.square().sum().sqrt())


def of_mmcv(block, feature):
    """mmcv's non-local block of the same weights, which makes the matrix of all pairs."""
    channels = feature.shape[1]
    other = NonLocal2d(
        channels, reduction=2, norm_cfg=dict(type='BN'), mode='dot_product', sub_sample=True, use_scale=False
    ).double()
    parts = (other.theta.conv, other.phi[0].conv, other.g[0].conv, other.conv_out.conv, other.conv_out.bn)
    for part, own in zip(parts, (block.query, block.key, block.value, block.output, block.norm), strict=True):
        part.weight.data.copy_(own.weight)
        if part.bias is not None:
            part.bias.data.copy_(own.bias)
    return other(feature)


def test_the_block_is_that_of_mmcv():
    feature = closed_form_inputs((2, 6, 4, 8))[0].double()
    block = filled(NonLocal(6))
    found = block(feature, feature)
    torch.testing.assert_close(found, of_mmcv(block, feature))
    assert (found - feature).abs().max() > 0.1


def test_the_attention_is_the_mean_of_both_without_gradient():
    student, teacher = torch.randn(2, 3, 4, 6, requires_grad=True), torch.randn(2, 5, 4, 6)
    found = common_attention(student, teacher)
    torch.testing.assert_close(found, (attention(student)[0] + attention(teacher)[0]) / 2)
    torch.testing.assert_close(found.mean((1, 2)), torch.ones(2))
    assert not found.requires_grad


def test_equal_features_have_no_distance_and_a_finite_gradient():
    feature = torch.randn(2, 3, 4, 6)
    student = feature.clone().requires_grad_()
    found = distance(student, feature, torch.rand(2, 4, 6))
    found.backward()
    assert found == 0
    assert (student.grad == 0).all()


def test_it_is_a_distance_and_not_its_square():
    student, teacher = torch.randn(2, 2, 3, 4, 6, dtype=torch.float64)
    near = distance(teacher + 0.1 * (student - teacher), teacher)
    torch.testing.assert_close(near, 0.1 * distance(student, teacher))
    twice = distance(student.repeat(2, 1, 1, 1), teacher.repeat(2, 1, 1, 1))
    torch.testing.assert_close(twice, math.sqrt(2) * distance(student, teacher))


def tapped(student, teacher, distiller, images=2):
    distiller.setup(probe(student, distiller.student_layers), probe(teacher, distiller.teacher_layers))
    batch = torch.ones(images, 3, 96, 128).normal_(generator=torch.Generator().manual_seed(0))
    taps = []
    for model, layers in ((student, distiller.student_layers), (teacher, distiller.teacher_layers)):
        with Taps(model, layers) as read:
            model.extract_feat(batch)
        taps.append(read)
    return taps


@pytest.mark.parametrize('channels', [16, 24])
def test_losses_are_weighted_sums_over_levels_and_all_is_trained(channels):
    student, teacher = models.build(detectors.retinanet(), seed=0), models.build(detectors.retinanet(channels), seed=1)
    weights = dict(feature_weight=2.0, channel_weight=3.0, spatial_weight=5.0, relation_weight=7.0)
    distiller = FKD('neck', **weights, tau=0.8)
    taps = tapped(student, teacher, distiller)
    for block in distiller.blocks:
        for each in (block.non_local, block.teacher_non_local):  # after a first step
            torch.nn.init.normal_(each.norm.weight)
    found = distiller(*taps, None)
    levels = zip(taps[0]['neck'], taps[1]['neck'], distiller.blocks, strict=True)
    expected = torch.stack([torch.stack(block(s, t, 0.8)) for s, t, block in levels]).sum(0)
    assert list(found) == TERMS
    for key, weight, value in zip(TERMS, weights.values(), expected):
        torch.testing.assert_close(found[key], weight * value)
    sum(found.values()).backward()
    parts = dict(distiller.named_parameters())
    # a constant that is added before or after the norm of a channel is not seen
    assert all(each.grad.abs().sum() > 0 for name, each in parts.items() if each.dim() == 4)
    assert all(each.grad is not None for each in parts.values())
    assert student.neck.lateral_convs[0].conv.weight.grad.abs().sum() > 0
    assert all(each.grad is None for each in teacher.parameters())
    assert not list(distiller.buffers())


@pytest.mark.parametrize('options', [dict(tau=0.0), dict(match='size'), dict(spatial_weight='1')])
def test_options_out_of_range_are_errors(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        FKD('neck', **options)
