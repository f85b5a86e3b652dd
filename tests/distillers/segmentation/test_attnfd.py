import math

import pytest
import torch

from mmkd.distill import distill
from mmkd.distillers.segmentation.attnfd import AttentionAdapter, AttnFD, attention_gates, guided_distance
from mmkd.errors import ConfigError
from mmkd.testing import models, segmentors
from mmkd.testing.batches import random_batch


def sigmoid(value):
    return 1 / (1 + math.exp(-value))


def test_gates_as_plain_loops():
    feature = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    found = attention_gates(feature)
    for b in range(2):
        rows = [[value for row in plane for value in row] for plane in feature[b].tolist()]
        rows = [[value * sigmoid(sum(row) / len(row) + max(row)) for value in row] for row in rows]
        for a in range(20):
            column = [row[a] for row in rows]
            gate = sigmoid(sum(column) / len(column) + max(column))
            for c in range(3):
                assert found[b, c].flatten()[a].item() == pytest.approx(column[c] * gate, rel=1e-9)


def test_the_distance_as_plain_loops_and_its_bounds():
    student, teacher = torch.randn(2, 2, 3, 4, 5, dtype=torch.float64)
    total = 0.0
    for s, t in zip(student, teacher):
        s, t = s.flatten().tolist(), t.flatten().tolist()
        lengths = [math.sqrt(sum(value * value for value in each)) for each in (s, t)]
        total += sum((x / lengths[0] - y / lengths[1]) ** 2 for x, y in zip(s, t))
    assert guided_distance(student, teacher).item() == pytest.approx(total / 2, rel=1e-9)
    assert guided_distance(student, 3 * student).item() == pytest.approx(0, abs=1e-12)
    assert guided_distance(student, -student).item() == pytest.approx(4)
    one = guided_distance(student[:1], teacher[:1])
    torch.testing.assert_close(guided_distance(student[:1].repeat(3, 1, 1, 1), teacher[:1].repeat(3, 1, 1, 1)), one)


def test_a_feature_of_zeros_is_finite_and_differentiable():
    student = torch.zeros(2, 3, 4, 5, requires_grad=True)
    loss = guided_distance(student, torch.randn(2, 3, 4, 5))
    loss.backward()
    assert loss.item() == pytest.approx(1)
    assert torch.isfinite(student.grad).all()
    assert guided_distance(student, attention_gates(torch.zeros(2, 3, 4, 5))) == 0


def test_the_gradient_reaches_the_student_alone():
    student, teacher = (torch.randn(2, 3, 4, 5, requires_grad=True) for _ in range(2))
    guided_distance(student, attention_gates(teacher)).backward()
    assert student.grad.any()
    assert teacher.grad is None


def test_the_adapter_gates_channels_then_positions():
    """With a perceptron and convolutions that pass on what they get, its gates are those without parameters."""
    adapter = AttentionAdapter(4, 4, reduction=1).eval()
    adapter.adapter = torch.nn.Identity()
    adapter.positions = torch.nn.Conv2d(2, 1, 7, padding=3, bias=False)
    with torch.no_grad():
        for layer in (adapter.channels[0], adapter.channels[2]):
            layer.weight.copy_(torch.eye(4)[:, :, None, None])
            layer.bias.zero_()
        adapter.positions.weight.zero_()[:, :, 3, 3] = 1
    feature = torch.rand(2, 4, 5, 6)  # not negative, which the perceptron's ReLU passes on
    torch.testing.assert_close(adapter(feature), attention_gates(feature))


@pytest.mark.parametrize(('channels', 'hidden'), [(64, 4), (16, 1), (4, 1)])
def test_the_hidden_layer_is_never_empty(channels, hidden):
    adapter = AttentionAdapter(channels, 8)
    assert adapter.channels[0].out_channels == hidden
    assert adapter(torch.randn(2, channels, 5, 6)).shape == (2, 8, 5, 6)
    assert not list(adapter.buffers())


def pair(tmp_path, family='pspnet', **options):
    config = getattr(segmentors, family)(24, base=16)
    checkpoint = models.save_weights(config, tmp_path / 'teacher.pth')
    student = models.build(getattr(segmentors, family)(), seed=0)
    model = distill(student, dict(config=config, checkpoint=checkpoint), dict(attnfd=dict(type='AttnFD', **options)))
    model.sources['teacher'].load()
    return model.train()


@pytest.mark.parametrize(
    ('family', 'layer'),
    [
        ('pspnet', ['backbone.layer4', 'decode_head.bottleneck']),
        ('deeplabv3', 'decode_head.bottleneck'),
        ('segformer', 'backbone'),
    ],
)
def test_a_training_step(family, layer, tmp_path):
    """All levels, every trained part, and no ground truth."""
    model = pair(tmp_path, family, layer=layer)
    levels = {'pspnet': 2, 'deeplabv3': 1, 'segformer': 4}[family]
    assert [type(each) for each in model.distillers.attnfd.levels.adapters] == [AttentionAdapter] * levels
    data = model.data_preprocessor(random_batch(model, (2, 3, 64, 96)), True)
    loss = model(**data, mode='loss')['attnfd.loss']
    assert 0 < loss < 0.33 * 4 * levels
    loss.backward()
    for name, parameter in model.distillers.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
    assert next(model.backbone.parameters()).grad.any()
    assert all(each.grad is None for each in model.sources['teacher'].model.parameters())


def test_the_student_is_plain_beside_the_adapters(tmp_path):
    model = pair(tmp_path, layer='backbone.layer4')
    keys = {key for key in model.state_dict() if not key.startswith('distillers.attnfd.levels.adapters.0.')}
    assert keys == set(models.build(segmentors.pspnet(), seed=0).state_dict())


@pytest.mark.parametrize('reduction', [0, 2.5, '16'])
def test_a_reduction_out_of_range_is_an_error(reduction):
    with pytest.raises(ConfigError, match='reduction'):
        AttentionAdapter(4, 4, reduction)


@pytest.mark.parametrize('options', [dict(loss_weight='1'), dict(match='size')])
def test_options_out_of_range_are_errors(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        AttnFD('backbone.layer4', **options)
