"""A teacher that sees the images at another size, and one that is compiled."""

import pytest
import torch
import torch.nn.functional as F

import mmkd
from mmkd.distillers.generic.kd import binary_divergence
from mmkd.errors import ConfigError
from mmkd.hosts.running import scaled_samples
from mmkd.testing import detectors, models, segmentors
from mmkd.testing.batches import random_batch

CWD = dict(type='CWD', layer='neck')


def build(make, entry, teacher=None, **options):
    model = mmkd.distill(
        models.build(make(), seed=0), dict(config=models.build((teacher or make)(), seed=1), **options), dict(it=entry)
    )
    model.sources['teacher'].load()
    return model.train()


def batch(model, size=(64, 96)):
    return model.data_preprocessor(random_batch(model, (2, 3, *size)), True)


def loss(model, data=None):
    torch.manual_seed(0)
    return model(**(data or batch(model)), mode='loss')['it.loss']


@pytest.mark.parametrize(
    ('make', 'entry'),
    [
        (detectors.retinanet, CWD),
        (detectors.retinanet, dict(type='KD')),
        (detectors.faster_rcnn, dict(type='KD')),
        (segmentors.pspnet, dict(type='KD')),
    ],
)
def test_a_scale_of_one_is_none(make, entry):
    torch.testing.assert_close(loss(build(make, entry, scale=1.0)), loss(build(make, entry)), rtol=0, atol=0)


def test_levels_belong_together_where_their_maps_are_of_one_size():
    """The student's P3 with the teacher's P4 of the doubled image."""
    model = build(detectors.retinanet, CWD, scale=2.0)
    assert model.distillers.it.levels.pairs == [(0, 0, 1), (0, 1, 2)]
    data = batch(model)
    taps = model.sources['teacher'](**data)
    with torch.no_grad():
        doubled = F.interpolate(data['inputs'], scale_factor=2.0, mode='bilinear')
        expected = model.sources['teacher'].model.extract_feat(doubled)
    assert [level.shape[2:] for level in taps['neck']] == [level.shape[2:] for level in expected]
    torch.testing.assert_close(taps['neck'][1], expected[1])
    assert loss(model, data) > 0


def test_slots_belong_together_alike():
    model = build(detectors.retinanet, dict(type='KD'), scale=2.0)
    data = batch(model)
    with torch.no_grad():
        own = model.bbox_head(model.extract_feat(data['inputs']))[0][:2]
        doubled = F.interpolate(data['inputs'], scale_factor=2.0, mode='bilinear')
        teacher = model.sources['teacher'].model
        other = teacher.bbox_head(teacher.extract_feat(doubled))[0][1:]
    slots = [
        torch.cat([each.unflatten(1, (-1, 3)).transpose(1, 2).flatten(2) for each in levels], 2)
        for levels in (own, other)
    ]
    torch.testing.assert_close(loss(model, data), binary_divergence(*slots), rtol=1e-4, atol=1e-6)


def test_regions_are_pooled_where_they_are_in_the_larger_image(monkeypatch):
    from mmkd.hosts.detection.rois import RoIHead

    seen = []
    pool = RoIHead.pool
    monkeypatch.setattr(
        RoIHead, 'pool', lambda self, taps, layer, rois: seen.append((taps, rois)) or pool(self, taps, layer, rois)
    )
    rois = {}
    for scale in (1.0, 2.0):
        model = build(detectors.faster_rcnn, dict(type='KD'), scale=scale)
        loss(model)
        rois[scale] = seen[-1][1]
    torch.testing.assert_close(rois[2.0], rois[1.0] * torch.tensor([1.0, 2, 2, 2, 2]))


def test_a_smaller_image_and_odd_sizes():
    for make, entry in (
        (segmentors.pspnet, dict(type='KD')),
        (segmentors.deeplabv3, dict(type='CWD', layer='decode_head.conv_seg')),
    ):
        for scale in (0.5, 1.3):
            model = build(make, entry, scale=scale)
            found = loss(model, batch(model, (64, 96)))
            found.backward()
            assert torch.isfinite(found)
            assert found > 0


def test_samples_have_the_size_that_the_teacher_sees():
    model = build(detectors.retinanet, CWD)
    (sample, _) = batch(model)['data_samples']
    (other, _) = scaled_samples(batch(model)['data_samples'], 2.0)
    assert other.img_shape == (2 * sample.img_shape[0], 2 * sample.img_shape[1])
    assert other.batch_input_shape == (128, 192)
    assert sample.batch_input_shape == (64, 96)


@pytest.mark.parametrize(
    ('entry', 'options', 'message'),
    [
        (dict(type='GID'), dict(scale=2.0), 'GID needs a teacher that sees images of the size of the student'),
        (CWD, dict(scale=0), 'scale=0: expected a number from 0.1 to 10'),
        (CWD, dict(scale='2'), 'scale'),
        (dict(type='KD'), dict(scale=3.0), 'have no level of the same stride'),
        (
            dict(type='CWD', layer='backbone.layer4'),
            dict(compile=True),
            "compile=True: layer 'backbone.layer4' is inside",
        ),
    ],
)
def test_what_does_not_go_together(entry, options, message):
    with pytest.raises(ConfigError, match=message):
        build(detectors.retinanet, entry, **options)


@pytest.mark.slow
def test_a_compiled_teacher_says_the_same():
    plain, compiled = (build(detectors.retinanet, CWD, compile=each) for each in (False, True))
    data = batch(plain)
    torch.testing.assert_close(loss(compiled, data), loss(plain, data), rtol=1e-4, atol=1e-6)
    assert compiled.sources['teacher'].model.backbone.forward is not plain.sources['teacher'].model.backbone.forward


def test_other_anchors_are_refused():
    other = dict(bbox_head=dict(anchor_generator=dict(ratios=[3.0, 0.2, 9.0])))
    with pytest.raises(
        ConfigError, match=r'level 0 of the student and 1 of the teacher have different anchors for scale=2.0'
    ):
        build(detectors.retinanet, dict(type='KD'), teacher=lambda: detectors.retinanet(**other), scale=2.0)
