import functools
import math

import pytest
import torch
import torch.nn.functional as F

import mmkd
from mmkd.distillers.detection.bckd import binary_class_loss, box_loss
from mmkd.distillers.detection.crosskd import CrossKD, aligned
from mmkd.distillers.detection.ld import distribution_divergence
from mmkd.errors import ConfigError
from mmkd.hosts.detection.dense_heads import dense_head, predict_from
from mmkd.hosts.running import probe
from mmkd.taps import Taps
from mmkd.testing import detectors, models
from mmkd.testing.batches import random_batch

FAMILIES = {
    name: functools.partial(getattr(detectors, name), bbox_head=dict(stacked_convs=2))
    for name in ('retinanet', 'gfl', 'fcos', 'atss')
}


def statistics(feature, channel):
    values = feature[:, channel].flatten().tolist()
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))


def test_the_alignment_as_plain_loops():
    student, teacher = torch.randn(2, 2, 3, 4, 5, dtype=torch.float64)
    found = aligned(student, 3 * teacher + 1)
    for c in range(3):
        (s_mean, s_deviation), (t_mean, t_deviation) = statistics(student, c), statistics(3 * teacher + 1, c)
        for value, expected in zip(student[:, c].flatten().tolist(), found[:, c].flatten().tolist()):
            assert t_deviation * (value - s_mean) / (s_deviation + 1e-6) + t_mean == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(aligned(2 * student - 3, teacher), aligned(student, teacher), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(aligned(teacher, teacher), teacher, rtol=1e-5, atol=1e-5)


def towers(head, features, position):
    """What each tower has after so many convolutions."""
    found = {}
    for tower in ('cls_convs', 'reg_convs'):
        found[tower] = list(features)
        for convolution in getattr(head, tower)[:position]:
            found[tower] = [convolution(each) for each in found[tower]]
    return found


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('position', [0, 1, 2])
def test_a_head_predicts_from_its_own_features_what_it_predicts(family, position):
    model = models.build(FAMILIES[family](), seed=0).eval()
    with torch.no_grad():
        features = model.extract_feat(torch.randn(2, 3, 96, 128))
        expected, names = model.bbox_head(features), dict(model.named_parameters())
        found = predict_from(model.bbox_head, position, towers(model.bbox_head, features, position))
    for a, b in zip(found, expected, strict=True):
        for level, other in zip(a, b, strict=True):
            assert torch.equal(level, other)
    assert dict(model.named_parameters()).keys() == names.keys()  # the head itself is as it was


def run(student='retinanet', teacher=None, size=(96, 128), t_options=None, bbox_head=None, **options):
    """The method, its losses, the taps and the samples."""
    networks = [
        models.build(FAMILIES[student](**({'bbox_head': bbox_head} if bbox_head else {})), seed=0),
        models.build(FAMILIES[teacher or student](**(t_options or {})), seed=1),
    ]
    networks[1].eval().requires_grad_(False)
    distiller = CrossKD(**{'position': 1, **options})
    distiller.prepare(*networks)
    distiller.setup(*(probe(each, distiller.student_layers) for each in networks))
    data = networks[0].data_preprocessor(random_batch(networks[0], (2, 3, *size), 3), True)
    taps = []
    for network in networks:
        with Taps(network, distiller.student_layers) as read:
            network.bbox_head(network.extract_feat(data['inputs']))
        taps.append(read)
    return distiller, distiller(*taps, data['data_samples']), taps, (data['inputs'], data['data_samples'])


@pytest.mark.parametrize('family', FAMILIES)
def test_the_losses_by_hand(family):
    """One convolution of the student's, the other and the predictors of the teacher's; all of it written out."""
    _, found, (s, t), (inputs, samples) = run(family, cls_weight=2.0, bbox_weight=3.0)
    own, other = s.model.bbox_head, t.model.bbox_head
    features = {}
    for tower in ('cls_convs', 'reg_convs'):
        levels = []
        for x, y in zip(s.model.extract_feat(inputs), t.model.extract_feat(inputs), strict=True):
            a, b = (getattr(head, tower)[0](each, activate=False) for head, each in ((own, x), (other, y)))
            levels.append(getattr(other, tower)[1](F.relu(aligned(a, b))))
        features[tower] = levels
    crossed, head = predict_from(other, 2, features), dense_head(other)
    logits, expected = head.slot_logits(crossed), head.slot_logits(t['bbox_head'])
    boxes = torch.stack([sample.gt_instances.bboxes for sample in samples])
    metas = [sample.metainfo for sample in samples]
    positive = dense_head(own).assigned(s['bbox_head'], boxes, torch.ones(2, 3, dtype=torch.bool), metas)
    classes = binary_class_loss(logits, expected, torch.ones(expected.shape[:2])) / max(1, positive.sum().item())
    torch.testing.assert_close(found['loss_cls'], 2 * classes, rtol=1e-4, atol=1e-6)
    weights = expected.sigmoid().amax(2)
    if family == 'gfl':
        sides = distribution_divergence(head.distributions(crossed), head.distributions(t['bbox_head']), 1.0, 'sum')
        regression = (sides.mean(2) * weights).sum()
    else:
        priors = head.priors(crossed)
        decoded = (head.decode(priors, head.regression(each)) for each in (crossed, t['bbox_head']))
        regression = box_loss(*decoded, weights)
    torch.testing.assert_close(found['loss_bbox'], 3 * regression / weights.sum(), rtol=1e-4, atol=1e-6)
    assert classes > 0
    assert regression > 0


def test_the_student_learns_up_to_the_crossing_and_the_teacher_nothing():
    distiller, found, (s, t), _ = run('gfl')
    sum(found.values()).backward()
    head = s.model.bbox_head
    for tower in (head.cls_convs, head.reg_convs):
        assert tower[0].conv.weight.grad.abs().sum() > 0
        assert tower[1].conv.weight.grad is None
    assert head.gfl_cls.weight.grad is None
    assert s.model.neck.lateral_convs[0].conv.weight.grad.abs().sum() > 0
    assert all(each.grad is None for each in t.model.parameters())
    assert not list(distiller.parameters())


def test_batch_norms_of_the_students_head_count_a_batch_once():
    norm = dict(stacked_convs=2, norm_cfg=dict(type='BN'))
    distiller, _, (s, t), (_, samples) = run('gfl', bbox_head=norm)
    tracked = {key: value.clone() for key, value in s.model.state_dict().items() if 'running' in key}
    assert tracked
    s.model.train()
    distiller(s, t, samples)
    assert all(torch.equal(s.model.state_dict()[key], value) for key, value in tracked.items())


def test_from_the_neck_the_head_learns_nothing():
    _, found, (s, _), _ = run(position=0)
    sum(found.values()).backward()
    assert all(each.grad is None for each in s.model.bbox_head.parameters())
    assert s.model.neck.lateral_convs[0].conv.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    'options', [dict(classes=5), dict(channels=24, bbox_head=dict(stacked_convs=3, feat_channels=24))]
)
def test_a_teacher_with_other_anchors_classes_channels_and_convolutions(options):
    distiller, found, _, _ = run('gfl', 'retinanet', t_options=options)
    sum(found.values()).backward()
    assert all(torch.isfinite(value) and value > 0 for value in found.values())
    assert len(list(distiller.parameters())) == (4 if 'channels' in options else 0)
    assert all(each.grad is not None for each in distiller.parameters())


@pytest.mark.parametrize(
    ('options', 'said'),
    [
        (dict(position=-1), 'position=-1: expected a whole number'),
        (dict(position=3), 'has 2 cls_convs, and position counts 3'),
        (dict(t_options=dict(bbox_head=dict(stacked_convs=0))), 'has 0 cls_convs'),
        (dict(teacher_head='neck'), 'how to read this head is not known'),
    ],
)
def test_what_cannot_work_is_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        run(**options)


def test_a_peers_head_is_refused():
    """It would learn from the student's loss."""
    student = models.build(FAMILIES['gfl'](), seed=0)
    with pytest.raises(ConfigError, match='must not learn from that'):
        mmkd.distill(
            student,
            dict(peer=dict(type='Peer', config=FAMILIES['gfl']())),
            dict(crosskd=dict(type='CrossKD', position=1)),
        )
