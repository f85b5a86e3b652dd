import math

import pytest
import torch

import mmkd
from mmkd.distillers.segmentation.tofd import TOFD, feature_distance, orthogonal_penalty
from mmkd.errors import ConfigError
from mmkd.testing import detectors, models, segmentors
from mmkd.testing.batches import random_batch

AUXILIARY = dict(
    type='FCNHead',
    num_convs=1,
    concat_input=False,
    channels=16,
    num_classes=19,
    norm_cfg=dict(type='BN'),
    align_corners=False,
    loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=0.4),
)


def test_the_distance_as_plain_loops():
    torch.manual_seed(0)
    student, teacher = (torch.randn(2, 3, 4, 5, dtype=torch.float64) for _ in range(2))
    squares = [
        sum((s - t) ** 2 for s, t in zip(student[b, :, y, x].tolist(), teacher[b, :, y, x].tolist()))
        for b in range(2)
        for y in range(4)
        for x in range(5)
    ]
    expected = math.sqrt(sum(squares) / len(squares))
    assert feature_distance(student, teacher).item() == pytest.approx(expected, rel=1e-12)


def test_equal_features_have_neither_distance_nor_gradient():
    student = torch.randn(2, 3, 4, 5, requires_grad=True)
    loss = feature_distance(student, student.detach())
    loss.backward()
    assert loss == 0
    assert not student.grad.any()


def test_the_penalty_as_plain_loops():
    torch.manual_seed(0)
    weight = torch.randn(4, 3)
    rows, columns = weight.tolist(), weight.t().tolist()
    expected = 0.0
    for vectors in (rows, columns):
        total = 0.0
        for i, a in enumerate(vectors):
            for j, b in enumerate(vectors):
                total += (sum(x * y for x, y in zip(a, b)) - (i == j)) ** 2
        expected += math.sqrt(total)
    assert orthogonal_penalty(weight).item() == pytest.approx(expected, rel=1e-5)


def test_what_is_orthogonal_has_no_penalty():
    square = torch.linalg.qr(torch.randn(6, 6)).Q
    assert orthogonal_penalty(square).item() == pytest.approx(0, abs=1e-5)
    assert orthogonal_penalty(square[:, :2]).item() == pytest.approx(2.0, rel=1e-4)  # sqrt(6 - 2)


def model_of(tmp_path, student, teacher, **options):
    torch.manual_seed(0)
    checkpoint = models.save_weights(teacher, tmp_path / 'teacher.pth')
    spec = dict(type='TOFD', **options)
    built = models.build(student, seed=0)
    model = mmkd.distill(built, dict(config=teacher, checkpoint=checkpoint), dict(it=spec))
    model.init_weights()
    return model.train()


def several(channels):
    return segmentors.pspnet(
        channels,
        auxiliary_head=[dict(AUXILIARY, in_channels=8 * 2**i, in_index=i, channels=channels) for i in (1, 2)],
    )


@pytest.mark.parametrize(
    ('make', 'layers'),
    [
        (segmentors.pspnet, ('decode_head.dropout:input', 'auxiliary_head.dropout:input')),
        (
            several,
            ('decode_head.dropout:input', 'auxiliary_head.0.dropout:input', 'auxiliary_head.1.dropout:input'),
        ),
    ],
)
def test_what_all_heads_classify_is_compared(make, layers, tmp_path):
    model = model_of(tmp_path, make(16), make(24), feature_weight=2.0, orthogonal_weight=3.0)
    own, teacher = model.distillers['it'], model.sources['teacher']
    assert own.student_layers == own.teacher_layers == layers
    data = model.data_preprocessor(random_batch(model, (2, 3, 64, 64)), True)
    with mmkd.taps.Taps(model, layers) as student:
        found = model(**data, mode='loss')
    taps = teacher(data['inputs'], data['data_samples'])
    distances, penalties = 0.0, 0.0
    for layer, adapter in zip(layers, own.levels.adapters, strict=True):
        weight = adapter.conv.weight[:, :, 0, 0]
        adapted = torch.einsum('dc,bchw->bdhw', weight, student[layer][0])
        distances += feature_distance(adapted, taps[layer][0]).item()
        penalties += orthogonal_penalty(weight).item()
    assert found['it.loss_feature'].item() == pytest.approx(2 * distances, rel=1e-4)
    assert found['it.loss_orthogonal'].item() == pytest.approx(3 * penalties, rel=1e-4)


def test_named_layers_of_any_network(tmp_path):
    model = model_of(tmp_path, detectors.retinanet(), detectors.retinanet(24), layer='neck')
    assert len(model.distillers['it'].levels.adapters) == 3


@pytest.mark.parametrize(
    ('student', 'teacher', 'message'),
    [
        (dict(), dict(auxiliary_head=None), 'the teacher, EncoderDecoder, has no auxiliary_head'),
        (dict(auxiliary_head=None), dict(), 'the student, EncoderDecoder, has no auxiliary_head'),
    ],
)
def test_a_network_without_auxiliary_heads_is_an_error(student, teacher, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        model_of(tmp_path, segmentors.pspnet(**student), segmentors.pspnet(**teacher))


def test_other_numbers_of_heads_are_an_error(tmp_path):
    with pytest.raises(ConfigError, match='2 student and 3 teacher layers'):
        model_of(tmp_path, segmentors.pspnet(), several(16))


@pytest.mark.parametrize('options', [dict(layer=3), dict(teacher_layer=[]), dict(feature_weight=-1.0)])
def test_options_out_of_range_are_errors(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        TOFD(**options)
