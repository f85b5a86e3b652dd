import math

import pytest
import torch

from mmkd.distill import distill
from mmkd.distillers.detection.pgd import (
    background_of,
    box_feature_losses,
    by_level,
    centers_of,
    class_feature_losses,
    gaussian_weights,
    quality,
)
from mmkd.errors import ConfigError
from mmkd.hosts.detection.boxes import pairwise_iou
from mmkd.hosts.detection.dense_heads import dense_head
from mmkd.hosts.detection.ground_truth import GroundTruth, ground_truth, ground_truth_labels
from mmkd.taps import Taps
from mmkd.testing import detectors, models
from mmkd.testing.batches import random_batch

KEYS = ['loss_foreground', 'loss_background', 'loss_bbox', 'loss_attention']
CENTERS = torch.tensor([[8.0 * x + 4, 8.0 * y + 4] for y in range(6) for x in range(8)], dtype=torch.float64)
BOXES = torch.tensor([[[2.0, 2, 40, 30], [20, 10, 62, 47]], [[30, 5, 33, 9], [0, 0, 1, 1]]], dtype=torch.float64)
VALID = torch.tensor([[True, True], [True, False]])


def weights_plain_loops(qualities, topk):
    """Image by image, object by object, with numbers."""
    found = torch.zeros(len(qualities), len(CENTERS), dtype=torch.float64)
    for image in range(len(qualities)):
        for object_, there in enumerate(VALID[image].tolist()):
            if not there:
                continue
            values = qualities[image, object_].tolist()
            best = sorted(range(len(values)), key=lambda slot: -values[slot])[:topk]
            points = [CENTERS[slot].tolist() for slot in best]
            mean = [sum(point[side] for point in points) / topk for side in (0, 1)]
            covariance = [
                [sum((p[i] - mean[i]) * (p[j] - mean[j]) for p in points) / topk for j in (0, 1)] for i in (0, 1)
            ]
            for side in (0, 1):
                covariance[side][side] += 0.1**2 / 12
            inverse = torch.tensor(covariance, dtype=torch.float64).inverse()
            x1, y1, x2, y2 = BOXES[image, object_].tolist()
            for slot, (x, y) in zip(best, points):
                if x1 < x < x2 and y1 < y < y2:
                    away = torch.tensor([x - mean[0], y - mean[1]], dtype=torch.float64)
                    weight = math.exp(-0.5 * (away @ inverse @ away).item())
                    found[image, slot] = max(found[image, slot].item(), weight)
    return found


@pytest.mark.parametrize('topk', [1, 9])
def test_weights_as_plain_loops(topk):
    qualities = torch.rand(2, 2, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    near = (CENTERS - torch.tensor([33.0, 21.5])).square().sum(1)
    qualities[:, 1] = (-near / 100).exp()
    found = gaussian_weights(qualities, CENTERS, BOXES, VALID, topk)
    torch.testing.assert_close(found, weights_plain_loops(qualities, topk))
    assert (found[0] > 0).sum() >= min(topk, 2)


def test_centers_in_one_row_or_all_slots_of_an_image_stay_finite():
    qualities = torch.zeros(1, 1, 48)
    qualities[..., :8] = 1
    box = torch.tensor([[[0.0, 0, 64, 48]]])
    found = gaussian_weights(qualities, CENTERS.float(), box, torch.ones(1, 1, dtype=torch.bool), 8)
    assert torch.isfinite(found).all()
    assert (found > 0).sum() == 8
    assert torch.isfinite(gaussian_weights(qualities, CENTERS.float(), box, VALID[1:, :1], 100)).all()


def test_the_quality_is_between_score_and_overlap():
    scores, overlaps = torch.rand(2, 1, 2, 5)
    torch.testing.assert_close(quality(scores, overlaps, 0.0), scores)
    torch.testing.assert_close(quality(scores, overlaps, 1.0), overlaps)
    torch.testing.assert_close(quality(scores, overlaps, 0.5), (scores * overlaps).sqrt())


def test_background_is_where_no_object_is():
    found = background_of(CENTERS, GroundTruth(BOXES, VALID))
    for image in range(2):
        for slot, (x, y) in enumerate(CENTERS.tolist()):
            inside = any(
                there and x1 < x < x2 and y1 < y < y2
                for (x1, y1, x2, y2), there in zip(BOXES[image].tolist(), VALID[image].tolist())
            )
            assert found[image, slot].item() == (not inside)


def softmax(values):
    exponentials = [math.exp(each - max(values)) for each in values]
    return [each / sum(exponentials) for each in exponentials]


def attention_plain_loops(feature, tau):
    """Of one image as nested lists, (C, H, W): A^S by cell and A^C by cell."""
    channels, cells = len(feature), [(y, x) for y in range(len(feature[0])) for x in range(len(feature[0][0]))]
    means = [sum(abs(feature[c][y][x]) for c in range(channels)) / channels / tau for y, x in cells]
    spatial = {cell: len(cells) * each for cell, each in zip(cells, softmax(means))}
    each = {(y, x): [abs(feature[c][y][x]) / tau for c in range(channels)] for y, x in cells}
    return spatial, {cell: [channels * p for p in softmax(values)] for cell, values in each.items()}


@pytest.mark.parametrize('tau', [0.8, 0.5])
def test_losses_as_plain_loops(tau):
    student, teacher = torch.randn(2, 2, 3, 4, 5, dtype=torch.float64)
    weights = torch.rand(2, 4, 5, dtype=torch.float64) * (torch.rand(2, 4, 5) > 0.5)
    background = (torch.rand(2, 4, 5) > 0.3).double()
    near = far = apart_spatial = apart_channel = box = box_apart = 0.0
    number = int((weights > 0).sum())
    for b in range(2):
        s, t = student[b].tolist(), teacher[b].tolist()
        (s_spatial, s_channel), (t_spatial, t_channel) = attention_plain_loops(s, tau), attention_plain_loops(t, tau)
        counts = [int((each[b] > 0).sum()) for each in (weights, background)]
        for y, x in t_spatial:
            squared = sum(t_channel[y, x][c] * (s[c][y][x] - t[c][y][x]) ** 2 for c in range(3))
            differ = sum(abs(s_channel[y, x][c] - t_channel[y, x][c]) for c in range(3))
            near += weights[b, y, x].item() / counts[0] * t_spatial[y, x] * squared / 2
            far += background[b, y, x].item() / counts[1] * t_spatial[y, x] * squared / 2
            apart_spatial += abs(s_spatial[y, x] - t_spatial[y, x]) / 2
            apart_channel += differ / (2 * 4 * 5)
            if weights[b, y, x] > 0:
                box += weights[b, y, x].item() * squared / 3 / number
                box_apart += differ / number
    found = [each.item() for each in class_feature_losses(student, teacher, weights, background, tau)]
    assert found == pytest.approx([near, far, apart_spatial + apart_channel])
    found = [each.item() for each in box_feature_losses(student, teacher, weights, tau)]
    assert found == pytest.approx([box, box_apart])
    assert [each.item() for each in class_feature_losses(teacher, teacher, weights, background)] == [0, 0, 0]


def test_anchors_of_a_position_are_put_together():
    slots = torch.arange(2 * (2 * 6 + 2 * 2)).view(2, 16)
    first, second = by_level(slots, [(2, 2, 3), (2, 1, 2)])
    assert first.shape == (2, 2, 3, 2)
    assert second.shape == (2, 1, 2, 2)
    assert first[0, 1, 0].tolist() == [6, 7]
    assert second[1, 0, 1].tolist() == [30, 31]


def pair(student=detectors.gfl, teacher=None, channels=24, seed=1, **options):
    own, other = models.build(student(), seed=0), models.build((teacher or student)(channels), seed=seed)
    model = distill(own, other, dict(it=dict(type='PGD', **options)))
    model.sources['teacher'].load()
    return model.train()


def batch_of(model, objects=4):
    return model.data_preprocessor(random_batch(model, (2, 3, 96, 128), objects), True)


def losses(model, objects=4):
    found = model(**batch_of(model, objects), mode='loss')
    return {key.removeprefix('it.'): value for key, value in found.items() if key.startswith('it.')}


@pytest.mark.parametrize('detector', [detectors.gfl, detectors.fcos, detectors.retinanet])
def test_weights_are_those_of_the_teachers_predictions(detector):
    """Of all levels together, for the class and the box of each object, the largest of a position's anchors."""
    model = pair(detector, topk=9, cls_share=0.3, bbox_share=1.0)
    batch, teacher = batch_of(model), model.sources['teacher'].model
    with torch.no_grad(), Taps(teacher, model.distillers['it'].teacher_layers) as taps:
        teacher.bbox_head(teacher.extract_feat(batch['inputs']))
    found = model.distillers['it'].weights(taps, batch['data_samples'])
    head, outputs = dense_head(teacher.bbox_head), taps['bbox_head']
    truth, labels = ground_truth(batch['data_samples']), ground_truth_labels(batch['data_samples'])
    decoded = head.decode(head.priors(outputs), head.regression(outputs))
    scores = torch.stack([each.sigmoid()[:, of].T for each, of in zip(head.slot_logits(outputs), labels)])
    overlaps = pairwise_iou(truth.boxes, decoded)
    for share, levels in zip((0.3, 1.0), found):
        each = scores ** (1 - share) * overlaps**share
        weights = gaussian_weights(each, centers_of(head, outputs), *truth, 9)
        start = 0
        for level in levels:
            size = level[0].numel() * teacher.bbox_head.num_base_priors
            expected = weights[:, start : start + size].view(2, level[0].numel(), -1).amax(2)
            torch.testing.assert_close(level.flatten(1), expected)
            start += size
    assert max(level.max() for level in found[0]) > 0


def test_losses_are_weighted_sums_over_levels():
    weights = dict(foreground_weight=2.0, background_weight=3.0, bbox_weight=5.0, attention_weight=7.0)
    model = pair(channels=16, **weights)
    distiller, batch, taps = model.distillers['it'], batch_of(model), []
    for network, layers in (
        (model, distiller.student_layers),
        (model.sources['teacher'].model, distiller.teacher_layers),
    ):
        with Taps(network, layers) as read:
            network.bbox_head(network.extract_feat(batch['inputs']))
        taps.append(read)
    found = distiller(*taps, batch['data_samples'])
    of_classes, of_boxes, background = distiller.weights(taps[1], batch['data_samples'])
    expected = torch.zeros(4)
    for level in range(3):
        classes, boxes = (
            [read.per_call(f'bbox_head.{tower}.0')[level] for read in taps] for tower in ('cls_convs', 'reg_convs')
        )
        near, far, attended = class_feature_losses(*classes, of_classes[level], background[level])
        box, apart = box_feature_losses(*boxes, of_boxes[level])
        growth = (1.0, 1.25, 1.5)[level]
        expected += torch.stack([growth * near, growth * far, box, attended + apart]).detach()
    for key, weight, value in zip(KEYS, weights.values(), expected):
        torch.testing.assert_close(found[key].detach(), weight * value)


@pytest.mark.parametrize('objects', [0, 4])
@pytest.mark.parametrize('detector', [detectors.gfl, detectors.fcos, detectors.retinanet, detectors.atss])
def test_gradients_reach_student_and_adapters_and_never_the_teacher(detector, objects):
    model = pair(detector)
    found = losses(model, objects)
    assert list(found) == KEYS
    assert (found['loss_foreground'] == 0) == (objects == 0)
    assert all(torch.isfinite(each) for each in found.values())
    sum(found.values()).backward()
    adapters = dict(model.distillers.named_parameters())
    assert len(adapters) == 2 * 3 * 2
    assert all(torch.isfinite(each.grad).all() for each in adapters.values())
    assert model.bbox_head.cls_convs[0].conv.weight.grad.abs().sum() > 0
    assert model.neck.lateral_convs[0].conv.weight.grad.abs().sum() > 0
    assert all(each.grad is None for each in model.sources['teacher'].model.parameters())


@pytest.mark.parametrize(
    ('networks', 'message'),
    [
        (dict(teacher=lambda channels: detectors.gfl(channels, classes=5)), r'predict 3 \(student\) and 5 \(teacher\)'),
        (dict(student=detectors.faster_rcnn), "'bbox_head'.*no such module"),
    ],
)
def test_other_networks_are_refused(networks, message):
    with pytest.raises(ConfigError, match=message):
        pair(**networks)


@pytest.mark.parametrize(
    'options', [dict(tau=0.0), dict(topk=0), dict(cls_share=1.5), dict(bbox_share='a'), dict(bbox_weight='1')]
)
def test_options_out_of_range_are_errors(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        pair(**options)
