import math

import pytest
import torch

from mmkd.distillers.detection import frs
from mmkd.distillers.detection.frs import FRS
from mmkd.errors import ConfigError
from mmkd.hosts.running import probe
from mmkd.taps import Taps
from mmkd.testing import detectors, models

SHAPE = (2, 3, 4, 5, 6)  # images, anchors, classes, height, width


def logits(seed):
    return 2 * torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def sigmoid(value):
    return 1 / (1 + math.exp(-value))


def cells():
    return [(b, i, j) for b in range(2) for i in range(5) for j in range(6)]


def test_richness_is_the_largest_probability_of_all_anchors_and_classes():
    teacher = logits(1)
    mask = frs.richness(teacher)
    for b, i, j in cells():
        assert mask[b, i, j].item() == pytest.approx(max(map(sigmoid, teacher[b, :, :, i, j].flatten().tolist())))


def test_feature_loss_as_plain_loops():
    student, teacher = torch.randn(2, 2, 7, 5, 6, dtype=torch.float64)
    mask = frs.richness(logits(1))
    total = mass = 0.0
    for b, i, j in cells():
        weight = mask[b, i, j].item()
        difference = zip(student[b, :, i, j].tolist(), teacher[b, :, i, j].tolist())
        total += weight * sum((t - s) ** 2 for s, t in difference)
        mass += weight
    assert frs.rich_feature_loss(student, teacher, mask).item() == pytest.approx(total / mass, rel=1e-6)


def test_class_loss_as_plain_loops():
    student, teacher = logits(1), logits(2)
    mask = frs.richness(teacher)
    total = mass = 0.0
    for b, i, j in cells():
        weight = mask[b, i, j].item()
        for z_s, z_t in zip(student[b, :, :, i, j].flatten().tolist(), teacher[b, :, :, i, j].flatten().tolist()):
            s, t = sigmoid(z_s), sigmoid(z_t)
            total += weight * (t * math.log(t / s) + (1 - t) * math.log((1 - t) / (1 - s)))
        mass += weight
    assert frs.rich_class_loss(student, teacher, mask).item() == pytest.approx(total / mass, rel=1e-6)


def test_the_class_loss_has_the_gradient_of_the_papers_cross_entropy():
    student, teacher = logits(1).requires_grad_(), logits(2)
    mask = frs.richness(teacher)
    frs.rich_class_loss(student, teacher, mask).backward()
    loss = torch.nn.functional.binary_cross_entropy(student.sigmoid(), teacher.sigmoid(), reduction='none')
    (expected,) = torch.autograd.grad((loss.sum((1, 2)) * mask).sum() / mask.sum(), student)
    torch.testing.assert_close(student.grad, expected)


def test_the_number_of_images_does_not_matter():
    student, teacher = logits(1), logits(2)
    mask = frs.richness(teacher)
    twice = [each.repeat(2, *[1] * (each.dim() - 1)) for each in (student, teacher, mask)]
    torch.testing.assert_close(frs.rich_class_loss(*twice), frs.rich_class_loss(student, teacher, mask))
    features = [each.flatten(1, 2) for each in twice[:2]]
    expected = frs.rich_feature_loss(student.flatten(1, 2), teacher.flatten(1, 2), mask)
    torch.testing.assert_close(frs.rich_feature_loss(*features, twice[2]), expected)


@pytest.mark.parametrize('value', [-200.0, 200.0])
def test_probabilities_of_0_and_1_are_finite(value):
    teacher = torch.full((1, 1, 2, 3, 3), value)
    student = (-teacher).requires_grad_()
    loss = frs.rich_class_loss(student, teacher, frs.richness(teacher))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()


def pair(family='retinanet', teacher_family=None, same=False, **options):
    student = models.build(getattr(detectors, family)(), seed=0)
    teacher = getattr(detectors, teacher_family or family)(16 if same else 24, **options.pop('teacher', {}))
    teacher = models.build(teacher, seed=0 if same else 1)
    if family == 'faster_rcnn':
        options.setdefault('head', 'rpn_head')
    for each in ('feature_weight', 'cls_weight'):
        options.setdefault(each, 1.0)
    distiller = FRS(**options)
    distiller.prepare(student, teacher)
    distiller.setup(probe(student, distiller.student_layers), probe(teacher, distiller.teacher_layers))
    return student, teacher, distiller


def tapped(student, teacher, distiller):
    images = torch.randn(2, 3, 96, 128)
    taps = []
    for model, layers in ((student, distiller.student_layers), (teacher, distiller.teacher_layers)):
        with Taps(model, layers) as read:
            features = model.extract_feat(images)
            (model.rpn_head if hasattr(model, 'rpn_head') else model.bbox_head)(features)
        taps.append(read)
    return taps


def test_the_shell_adds_up_the_levels():
    student, teacher, distiller = pair(feature_weight=2.0, cls_weight=3.0)
    with torch.no_grad():
        for seed, model in enumerate((student, teacher)):  # predictions at the start are all near 0.01
            layer = model.bbox_head.retina_cls
            layer.weight.normal_(std=0.5, generator=torch.Generator().manual_seed(seed))
            layer.bias.zero_()
    s, t = tapped(student, teacher, distiller)
    feature = classes = 0.0
    for level in range(3):
        z_s, z_t = (taps['bbox_head'][0][level] for taps in (s, t))
        mask = z_t.sigmoid().amax(1)
        adapted = distiller.features.adapters[level](s['neck'][level])
        feature += ((adapted - t['neck'][level]) ** 2 * mask[:, None]).sum() / mask.sum()
        p_s, p_t = z_s.sigmoid(), z_t.sigmoid()
        divergence = p_t * (p_t / p_s).log() + (1 - p_t) * ((1 - p_t) / (1 - p_s)).log()
        classes += (divergence * mask[:, None]).sum() / mask.sum()
    found = distiller(s, t, None)
    assert list(found) == ['loss_feature', 'loss_cls']
    assert classes > 0.1
    torch.testing.assert_close(found['loss_feature'], 2 * feature)
    torch.testing.assert_close(found['loss_cls'], 3 * classes, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('family', ['retinanet', 'fcos', 'gfl', 'faster_rcnn'])
def test_zero_for_equal_networks(family):
    student, teacher, distiller = pair(family, same=True, adapter=None)
    losses = distiller(*tapped(student, teacher, distiller), None)
    assert {name: loss.item() for name, loss in losses.items()} == dict(loss_feature=0, loss_cls=0)


@pytest.mark.parametrize('family', ['retinanet', 'fcos', 'gfl', 'faster_rcnn'])
def test_gradients_reach_student_and_adapters_and_never_the_teacher(family):
    student, teacher, distiller = pair(family)
    losses = distiller(*tapped(student, teacher, distiller), None)
    assert all(loss > 0 for loss in losses.values())
    sum(losses.values()).backward()
    head = student.get_submodule(distiller.head)
    assert any(each.grad is not None and each.grad.any() for each in head.parameters())
    assert student.neck.lateral_convs[0].conv.weight.grad.any()
    assert all(each.grad.any() for each in distiller.parameters())
    assert len(list(distiller.parameters())) == 2 * len(student.neck(student.backbone(torch.randn(1, 3, 64, 64))))
    assert all(each.grad is None for each in teacher.parameters())


def test_weights_warm_up_and_all_parts_take_part_at_0():
    distiller = FRS()
    assert [distiller.feature_weight.at(i) for i in (0, 250, 500, 9999)] == pytest.approx([0, 0.0025, 0.005, 0.005])
    assert [distiller.cls_weight.at(i) for i in (0, 250, 500, 9999)] == pytest.approx([0, 0.01, 0.02, 0.02])
    student, teacher, distiller = pair(feature_weight=dict(type='linear', value=1.0, end=500), cls_weight=0)
    losses = distiller(*tapped(student, teacher, distiller), None)
    losses['loss_feature'].backward()
    assert losses['loss_feature'].item() == 0
    assert all(each.grad is not None for each in distiller.parameters())


def test_without_classes_the_heads_may_differ():
    """P3 to P5 of a RetinaNet learn from P3 to P5 of P2 to P6 of a Faster R-CNN, with the masks of these levels."""
    student, teacher, distiller = pair('retinanet', 'faster_rcnn', teacher_head='rpn_head', cls_weight=0)
    s, t = tapped(student, teacher, distiller)
    expected = 0.0
    for level in range(3):
        mask = t['rpn_head'][0][level + 1].sigmoid().amax(1)
        adapted = distiller.features.adapters[level](s['neck'][level])
        expected += ((adapted - t['neck'][level + 1]) ** 2 * mask[:, None]).sum() / mask.sum()
    found = distiller(s, t, None)
    assert list(found) == ['loss_feature']
    torch.testing.assert_close(found['loss_feature'], expected)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(teacher=dict(classes=5)), '3 .student. and 5 .teacher. classes, and FRS'),
        (dict(teacher=dict(bbox_head=dict(anchor_generator=dict(ratios=[1.0])))), 'different slots'),
        (dict(teacher=dict(bbox_head=dict(anchor_generator=dict(octave_base_scale=6)))), 'different anchors'),
        (dict(layer='backbone'), "levels of the teacher have sizes .* in 'backbone'"),
        (dict(head='rpn_head'), "'rpn_head': RetinaNet has no such module"),
        (dict(adapter=None), '16 and 24 channels with adapter=None'),
        (dict(cls_weight='much'), 'finite number'),
    ],
)
def test_pairs_that_cannot_be_compared_are_errors(options, message):
    with pytest.raises(ConfigError, match=message):
        pair(**options)
