import math

import pytest
import torch
import torch.nn.functional as F

from mmkd.adapters import Adapters
from mmkd.distill import distill
from mmkd.distillers.generic.reviewkd import Fusions, context_loss
from mmkd.distillers.segmentation.transkd import ChannelSelection, SelectiveFusion, TransKD
from mmkd.errors import ConfigError
from mmkd.taps import Taps
from mmkd.testing import models, segmentors
from mmkd.testing.batches import random_batch


@pytest.mark.parametrize('images', [3, 1])
def test_the_selection_as_plain_loops(images):
    """Of one image nothing is normalized."""
    torch.manual_seed(0)
    select = ChannelSelection(4).double()
    with torch.no_grad():
        select.norm.weight.uniform_(0.5, 2)
        select.norm.bias.uniform_(-1, 1)
    x, y = (torch.randn(images, 4, 3, 5, dtype=torch.float64) for _ in range(2))
    a, b = select(x, y)
    assert a.shape == b.shape == (images, 4, 1, 1)
    squeeze = select.squeeze.weight.tolist()
    hidden = []
    for i in range(images):
        pooled = [sum((x + y)[i, c].flatten().tolist()) / 15 for c in range(4)]
        hidden.append([sum(w * p for w, p in zip(row, pooled)) for row in squeeze])
    assert len(squeeze) == 32
    for k in range(32):
        values = [row[k] for row in hidden]
        mean = sum(values) / images
        variance = sum((value - mean) ** 2 for value in values) / images
        for row in hidden:
            normalized = (row[k] - mean) / math.sqrt(variance + 1e-5) if images > 1 else row[k]
            row[k] = max(normalized * select.norm.weight[k].item() + select.norm.bias[k].item(), 0.0)
    weight, bias = select.select.weight.tolist(), select.select.bias.tolist()
    for i in range(images):
        scores = [sum(w * z for w, z in zip(row, hidden[i])) + p for row, p in zip(weight, bias)]
        for c in range(4):
            expected = math.exp(scores[c]) / (math.exp(scores[c]) + math.exp(scores[4 + c]))
            assert a[i, c].item() == pytest.approx(expected, rel=1e-9)
            assert b[i, c].item() == pytest.approx(1 - expected, rel=1e-9)


@pytest.mark.parametrize(('channels', 'hidden'), [(16, 32), (64, 32), (1024, 64)])
def test_the_hidden_layer_of_the_selection(channels, hidden):
    assert ChannelSelection(channels).squeeze.weight.shape == (hidden, channels)


def norm(feature):
    variance, mean = torch.var_mean(feature, (0, 2, 3), correction=0, keepdim=True)
    return (feature - mean) / (variance + 1e-5).sqrt()


def test_a_fusion_step_by_step():
    torch.manual_seed(0)
    fusion = SelectiveFusion(5, 7, 4, deepest=False).double()
    level, deeper = torch.randn(2, 5, 6, 8, dtype=torch.float64), torch.randn(2, 4, 3, 4, dtype=torch.float64)
    x = norm(F.conv2d(level, fusion.reduce.conv.weight))
    y = deeper.repeat_interleave(2, 2).repeat_interleave(2, 3)
    a, b = fusion.attend(x, y)
    out, passed = fusion(level, deeper)
    torch.testing.assert_close(passed, a * x + b * y)
    torch.testing.assert_close(out, norm(F.conv2d(passed, fusion.put_out.conv.weight, padding=1)))
    assert SelectiveFusion(5, 7, 4, deepest=True).attend is None


def test_as_many_parameters_as_published():
    """4.56 million for 3.72 of a SegFormer-B0 that learns from a B2; ours have no layer of their own for a single image."""
    own, others = ([torch.zeros(2, c, 2, 2) for c in widths] for widths in ((32, 64, 160, 256), (64, 128, 320, 512)))
    fusions = Fusions(SelectiveFusion, own, others, TransKD().channels, ['backbone'])
    projections = Adapters(dict(type='ConvAdapter'), own, others)
    found = sum(each.numel() for part in (fusions, projections) for each in part.parameters())
    assert found == pytest.approx(0.84e6, abs=0.005e6)


def pair(tmp_path, student=None, teacher=None, **options):
    teacher = teacher or segmentors.segformer(24, base=12)
    checkpoint = models.save_weights(teacher, tmp_path / 'teacher.pth')
    torch.manual_seed(0)
    student = models.build(student or segmentors.segformer(), seed=0)
    options = dict(type='TransKD', channels=16, **options)
    model = distill(student, dict(config=teacher, checkpoint=checkpoint), dict(it=options))
    model.sources['teacher'].load()
    return model.train()


def batch_of(model, images=2):
    return model.data_preprocessor(random_batch(model, (images, 3, 64, 96)), True)


def test_the_losses_of_a_step(tmp_path):
    """Of each stage what the backbone puts out, and the tokens behind the patch embedding's norm."""
    weights = [0.5, 1.0, 2.0, 3.0]
    model = pair(tmp_path, feature_weight=2.0, embedding_weight=weights)
    own, data = model.distillers.it, batch_of(model)
    layers = own.student_layers
    assert layers == own.teacher_layers == ('backbone', *(f'backbone.layers.{i}.0' for i in range(4)))
    with Taps(model, layers) as student:
        found = model(**data, mode='loss')
    teacher = model.sources['teacher'](data['inputs'], data['data_samples'])
    squares = 0.0
    for layer, weight, adapter in zip(layers[1:], weights, own.embeddings.adapters, strict=True):
        (tokens, size), (targets, _) = student[layer], teacher[layer]
        assert tokens.shape[1] == size[0] * size[1]
        patch_embedding = model.get_submodule(layer)
        torch.testing.assert_close(tokens.mean(-1), patch_embedding.norm.bias.mean().expand(tokens.shape[:2]))
        projected = F.linear(tokens, adapter.conv.weight[:, :, 0, 0], adapter.conv.bias)
        squares += weight * (projected - targets).square().mean().item()
    assert found['it.loss_embedding'].item() == pytest.approx(squares, rel=1e-5)
    total, deeper = 0.0, None
    for i in (3, 2, 1, 0):
        fused, deeper = own.fusions[i](student['backbone'][i], deeper)
        total += context_loss(fused, teacher['backbone'][i]).item()
    assert found['it.loss_feature'].item() == pytest.approx(2 * total, rel=1e-5)


@pytest.mark.parametrize('images', [2, 1])
def test_each_loss_reaches_the_student_and_its_trained_parts_and_no_teacher(images, tmp_path):
    for key, parts in (('loss_feature', 'fusions'), ('loss_embedding', 'embeddings')):
        model = pair(tmp_path)
        model(**batch_of(model, images), mode='loss')[f'it.{key}'].backward()
        for name, parameter in model.distillers.it.named_parameters():
            if name.startswith(parts):
                assert parameter.grad.isfinite().all(), name
                assert parameter.grad.any() or 'norm' in name, name
        for embedding, *_ in model.backbone.layers:
            assert embedding.projection.weight.grad.any()
        assert model.decode_head.conv_seg.weight.grad is None
        assert all(each.grad is None for each in model.sources['teacher'].model.parameters())


def test_a_projection_also_where_channels_are_equal(tmp_path):
    model = pair(tmp_path, teacher=segmentors.segformer())
    assert [each.conv.weight.shape[:2] for each in model.distillers.it.embeddings.adapters] == [
        (channels, channels) for channels in (8, 8, 16, 16)
    ]


def test_the_student_is_plain_beside_what_is_trained(tmp_path):
    model = pair(tmp_path)
    keys = {key for key in model.state_dict() if not key.startswith('distillers.it.')}
    assert keys == set(models.build(segmentors.segformer(), seed=0).state_dict())
    assert {key.split('.')[2] for key in model.state_dict() if key not in keys} == {'fusions', 'embeddings'}


def test_maps_of_any_network_as_embeddings(tmp_path):
    """Other strides as well, which are resized."""
    stages = [f'backbone.layer{i}' for i in (2, 3, 4)]
    model = pair(
        tmp_path,
        segmentors.pspnet(),
        segmentors.segformer(24),
        layer=stages[1:],
        teacher_layer=['backbone.layers.1.0', 'backbone.layers.2.0'],
        embedding_layer='backbone.stem',
        teacher_embedding_layer='backbone.layers.0.0',
        embedding_weight=[1.0],
    )
    losses = model(**batch_of(model), mode='loss')
    assert losses['it.loss_feature'] > 0
    assert losses['it.loss_embedding'] > 0


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (
            dict(student=segmentors.pspnet()),
            r"^distillers.it: the student, EncoderDecoder, has no 'backbone.layers.0.0'.* name its own in embedding_layer",
        ),
        (
            dict(teacher=segmentors.pspnet(24)),
            r'^distillers.it: the teacher, .* name its own in teacher_embedding_layer, or take ReviewKD$',
        ),
        (dict(layer='decode_head.fusion_conv'), "layer='decode_head.fusion_conv': a single level.*name two layers"),
        (
            dict(embedding_weight=[1.0, 1.0]),
            r'embedding_weight: 2 weights for 4 patch embeddings \(backbone.layers.0.0',
        ),
        (
            dict(embedding_layer=['backbone.layers.0.0.nrom'], embedding_weight=[1.0]),
            "student layer 'backbone.layers.0.0.nrom'.*the nearest are 'backbone.layers.0.0.norm'",
        ),
        (
            dict(embedding_layer=['backbone.layers.0.0.norm'], embedding_weight=[1.0]),
            r'level 0 has shapes .*expected \(B, C, H, W\) maps',
        ),
        (
            dict(teacher_embedding_layer=['backbone.layers.0.0']),
            '4 student and 1 teacher layers',
        ),
    ],
)
def test_what_cannot_be_compared_is_an_error(changes, message, tmp_path):
    with pytest.raises(ConfigError, match=message) as caught:
        pair(tmp_path, **changes)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
    'options',
    [
        dict(channels=0),
        dict(channels=2.5),
        dict(feature_weight=-1.0),
        dict(embedding_weight=1.0),
        dict(embedding_weight='1111'),
        dict(embedding_weight=[1, 1, 1, -1]),
        dict(embedding_layer=[]),
        dict(teacher_embedding_layer=3),
    ],
)
def test_options_out_of_range_are_errors(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        TransKD(**options)
