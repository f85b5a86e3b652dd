import math

import pytest
import torch

from mmkd.distillers.detection.bckd import BCKD, binary_class_loss, box_loss, slots_of_levels_with_positives
from mmkd.errors import ConfigError
from mmkd.hosts.detection.dense_heads import dense_head
from mmkd.hosts.running import probe
from mmkd.taps import Taps
from mmkd.testing import detectors, models
from mmkd.testing.batches import random_batch
from mmkd.testing.closed_form import closed_form_inputs


def sigmoid(value):
    return 1 / (1 + math.exp(-value))


def classes_plain_loops(student, teacher, weights):
    total = 0.0
    for s_row, t_row, weight in zip(student.flatten(0, 1).tolist(), teacher.flatten(0, 1).tolist(), weights.flatten()):
        for s, t in zip(map(sigmoid, s_row), map(sigmoid, t_row)):
            total -= weight.item() * abs(s - t) * (t * math.log(s) + (1 - t) * math.log(1 - s))
    return total


def giou_plain(a, b):
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    overlap = max(width, 0) * max(height, 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - overlap
    around = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return overlap / union - (around - union) / around


def test_the_class_loss_as_plain_loops():
    student, teacher = 3 * torch.randn(2, 2, 7, 4, dtype=torch.float64)
    weights = torch.rand(2, 7, dtype=torch.float64)
    expected = classes_plain_loops(student, teacher, weights)
    assert binary_class_loss(student, teacher, weights).item() == pytest.approx(expected, rel=1e-9)
    assert binary_class_loss(student, student, weights).item() == 0


def test_the_value_of_the_authors_code():
    """Its function novel_kd_loss (Apache-2.0, commit 851f5b4), summed, on the closed-form inputs."""
    student, teacher = closed_form_inputs((2, 12, 5))
    assert binary_class_loss(student, teacher, torch.ones(2, 12)).item() == pytest.approx(40.882575, rel=1e-5)


def test_the_difference_of_the_probabilities_has_a_gradient_and_the_teacher_none():
    student, teacher = (torch.randn(1, 3, 2, requires_grad=True) for _ in range(2))
    binary_class_loss(student, teacher, torch.ones(1, 3)).backward()
    p, q = student.detach().sigmoid(), teacher.detach().sigmoid()
    entropy = -(q * p.log() + (1 - q) * (1 - p).log())
    expected = (p - q).abs() * (p - q) + entropy * (p - q).sign() * p * (1 - p)
    torch.testing.assert_close(student.grad, expected)
    assert teacher.grad is None


def test_the_box_loss_as_plain_loops():
    first = 50 * torch.rand(2, 2, 6, 2, dtype=torch.float64)
    student, teacher = torch.cat([first, first + 5 + 40 * torch.rand(2, 2, 6, 2, dtype=torch.float64)], -1)
    weights = torch.rand(2, 6, dtype=torch.float64)
    rows = zip(student.flatten(0, 1).tolist(), teacher.flatten(0, 1).tolist(), weights.flatten().tolist())
    expected = sum(weight * (1 - giou_plain(s, t)) for s, t, weight in rows)
    assert box_loss(student, teacher, weights).item() == pytest.approx(expected, rel=1e-9)


def test_levels_without_a_positive_do_not_count():
    positive = torch.zeros(2, 9, dtype=torch.bool)
    positive[1, 4] = True
    counted = slots_of_levels_with_positives(positive, [3, 4, 2])
    assert counted.tolist() == [[False] * 3 + [True] * 4 + [False] * 2]


def run(objects=3, student=detectors.gfl, teacher=detectors.gfl, size=(96, 128), **options):
    """The method's losses, and what it compared."""
    networks = [models.build(student(), seed=0), models.build(teacher(), seed=1)]
    distiller = BCKD(**options)
    distiller.prepare(*networks)
    distiller.setup(*(probe(each, distiller.student_layers) for each in networks))
    data = networks[0].data_preprocessor(random_batch(networks[0], (2, 3, *size), objects), True)
    taps = []
    for network in networks:
        with Taps(network, distiller.student_layers) as read:
            network.bbox_head(network.extract_feat(data['inputs']))
        taps.append(read)
    return distiller(*taps, data['data_samples']), taps, data['data_samples']


def test_both_losses_over_all_slots_of_levels_with_positives_in_the_image():
    found, (s, t), samples = run(cls_weight=2.0, bbox_weight=3.0)
    head, other = (dense_head(each.model.bbox_head) for each in (s, t))
    out, outputs = s['bbox_head'], t['bbox_head']
    boxes = torch.stack([sample.gt_instances.bboxes for sample in samples])
    metas = [sample.metainfo for sample in samples]
    positive = head.assigned(out, boxes, torch.ones(2, 3, dtype=torch.bool), metas)
    number = max(1, positive.sum().item())
    sizes = [level.shape[2] * level.shape[3] for level in out[0]]
    counted = torch.cat([each * each.any() + ~each * each.any() for each in positive.split(sizes, 1)], 1)
    assert 0 < counted.float().mean() < 1
    logits = head.slot_logits(out), other.slot_logits(outputs)
    expected = classes_plain_loops(*logits, counted) / number
    assert found['loss_cls'].item() == pytest.approx(2 * expected, rel=1e-4)
    weights = (logits[0].sigmoid() - logits[1].sigmoid()).abs().amax(2) * counted
    priors = head.priors(out)
    decoded = head.decode(priors, head.regression(out)), head.decode(priors, other.regression(outputs))
    torch.testing.assert_close(found['loss_bbox'], 3 * box_loss(*decoded, weights) / number)


def test_a_batch_without_objects_has_differentiable_zeros():
    found, _, _ = run(objects=0)
    assert {key: value.item() for key, value in found.items()} == {'loss_cls': 0, 'loss_bbox': 0}
    assert all(value.requires_grad for value in found.values())


def test_heads_that_predict_otherwise_are_refused():
    with pytest.raises(ConfigError, match='different units'):
        run(teacher=detectors.atss)
    with pytest.raises(ConfigError, match='classes'):
        run(teacher=lambda: detectors.gfl(classes=4))
