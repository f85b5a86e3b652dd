import math

import pytest
import torch

from mmkd.distill import distill
from mmkd.distillers.detection.defeat import (
    decoupled_class_losses,
    decoupled_feature_losses,
    object_masks,
)
from mmkd.errors import ConfigError
from mmkd.testing import detectors, models
from mmkd.testing.batches import random_batch

SHAPE = (96, 128)
SIZES = [(12, 16), (6, 8), (3, 4)]
# sides of 20, 120, 250 and 30 pixels: strides of 8, so that level 0 has those below 224
BOXES = torch.tensor(
    [[[8.0, 8.0, 28.0, 28.0], [4.0, 2.0, 124.0, 122.0]], [[-100.0, -120.0, 150.0, 130.0], [50.0, 40.0, 80.0, 70.0]]]
)
VALID = torch.tensor([[True, True], [True, False]])
KEYS = ['loss_object', 'loss_background', 'loss_cls_object', 'loss_cls_background']


def test_an_object_is_drawn_on_the_level_of_its_size():
    masks = object_masks(BOXES, VALID, SIZES, SHAPE)
    for level, (mask, size) in enumerate(zip(masks, SIZES)):
        cell = SHAPE[0] / size[0]
        for image in range(2):
            for y in range(size[0]):
                for x in range(size[1]):
                    expected = False
                    for box, there in zip(BOXES[image].tolist(), VALID[image].tolist()):
                        side = math.sqrt((box[2] - box[0]) * (box[3] - box[1]))
                        own = min(max(math.floor(math.log2(side / 112)), 0), 2) == level
                        touches = (
                            box[0] < (x + 1) * cell
                            and box[2] > x * cell
                            and box[1] < (y + 1) * cell
                            and box[3] > y * cell
                        )
                        expected |= there and own and touches
                    assert mask[image, y, x].item() == expected
    assert [mask.flatten(1).any(1).tolist() for mask in masks] == [[True, False], [False, True], [False, False]]


def test_levels_of_a_faster_rcnn_begin_at_56_pixels():
    boxes = torch.tensor([[[0.0, 0, side, side] for side in (111, 113, 223, 225)]])
    masks = object_masks(boxes[:, :2], torch.ones(1, 2, dtype=torch.bool), [(24, 32), (12, 16)], SHAPE)
    assert [mask.any().item() for mask in masks] == [True, True]
    masks = object_masks(boxes[:, :1], torch.ones(1, 1, dtype=torch.bool), [(24, 32), (12, 16)], SHAPE)
    assert [mask.any().item() for mask in masks] == [True, False]


def test_feature_losses_as_plain_loops():
    student, teacher = torch.randn(2, 2, 3, 4, 5, dtype=torch.float64)
    mask = torch.rand(2, 4, 5) > 0.6
    sums, counts = [0.0, 0.0], [0, 0]
    for b in range(2):
        for y in range(4):
            for x in range(5):
                side = 0 if mask[b, y, x] else 1
                for c in range(3):
                    sums[side] += (student[b, c, y, x] - teacher[b, c, y, x]).item() ** 2
                    counts[side] += 1
    found = [each.item() for each in decoupled_feature_losses(student, teacher, mask)]
    assert found == pytest.approx([total / (2 * count) for total, count in zip(sums, counts)])


def test_class_losses_as_plain_loops():
    student, teacher = 3 * torch.randn(2, 6, 4, dtype=torch.float64)
    objects = torch.tensor([True, False, False, True, False, False])
    background = torch.tensor([False, True, True, False, True, False])
    expected = []
    for regions in (objects, background):
        total = 0.0
        for s, t, counts in zip(student.tolist(), teacher.tolist(), regions.tolist()):
            p, q = ([math.exp(each / 2) for each in row] for row in (s, t))
            p, q = ([each / sum(row) for each in row] for row in (p, q))
            total += counts * sum(b * math.log(b / a) for a, b in zip(p, q)) * 4
        expected.append(total / int(regions.sum()))
    found = [each.item() for each in decoupled_class_losses(student, teacher, objects, background, 2.0)]
    assert found == pytest.approx(expected)


def test_without_objects_and_without_background():
    student = torch.randn(1, 3, 4, 5, requires_grad=True)
    none = torch.zeros(1, 4, 5, dtype=torch.bool)
    for mask, empty in ((none, 0), (~none, 1)):
        found = decoupled_feature_losses(student, torch.randn(1, 3, 4, 5), mask)
        assert found[empty].item() == 0
        assert found[empty].requires_grad
        assert found[1 - empty].item() > 0


def pair(student, teacher, **options):
    model = distill(
        models.build(student, seed=0), models.build(teacher, seed=1), dict(it=dict(type='DeFeat', **options))
    )
    model.sources['teacher'].load()
    return model.train()


def losses(model, objects=4):
    batch = model.data_preprocessor(random_batch(model, (2, 3, 96, 128), objects), True)
    torch.manual_seed(0)
    found = model(**batch, mode='loss')
    return {key.removeprefix('it.'): value for key, value in found.items() if key.startswith('it.')}


def test_classes_are_of_the_regions_that_the_student_is_trained_with():
    weights = dict(object_weight=2.0, background_weight=3.0, cls_object_weight=5.0, cls_background_weight=7.0)
    model = pair(detectors.faster_rcnn(), detectors.faster_rcnn(24), **weights)
    seen = {}

    def record(module, inputs, output):
        seen['features'] = inputs[0]

    def label(module, inputs):
        seen['logits'], seen['labels'] = inputs[:2]

    head = model.roi_head.bbox_head
    handles = [head.register_forward_hook(record), head.loss_cls.register_forward_pre_hook(label)]
    rois = {}
    handles.append(
        model.roi_head.bbox_roi_extractor.register_forward_hook(lambda module, inputs, _: rois.update(it=inputs[1]))
    )
    batch = model.data_preprocessor(random_batch(model, (2, 3, 96, 128), 4), True)
    torch.manual_seed(0)
    found = model(**batch, mode='loss')
    for handle in handles:
        handle.remove()
    teacher = model.sources['teacher'].model
    with torch.no_grad():
        maps = [level.contiguous() for level in teacher.extract_feat(batch['inputs'])]
        target = teacher.roi_head._bbox_forward(maps, rois['it'])['cls_score']
    labels = seen['labels']
    assert 0 < (labels < head.num_classes).sum() < len(labels)
    expected = decoupled_class_losses(
        seen['logits'], target, labels < head.num_classes, labels == head.num_classes, 1.0
    )
    torch.testing.assert_close(found['it.loss_cls_object'], 5 * expected[0])
    torch.testing.assert_close(found['it.loss_cls_background'], 7 * expected[1])


def test_features_are_the_mean_over_levels():
    none = dict(cls_object_weight=0.0, cls_background_weight=0)
    model = pair(detectors.retinanet(), detectors.retinanet(), object_weight=2.0, background_weight=3.0, **none)
    batch = model.data_preprocessor(random_batch(model, (2, 3, 96, 128), 4), True)
    found = model(**batch, mode='loss')
    levels, targets = (each.extract_feat(batch['inputs']) for each in (model, model.sources['teacher'].model))
    distiller = model.distillers['it']
    masks = distiller.masks(levels, batch['data_samples'])
    each = [
        decoupled_feature_losses(adapter(s), t, mask)
        for adapter, s, t, mask in zip(distiller.levels.adapters, levels, targets, masks)
    ]
    torch.testing.assert_close(found['it.loss_object'], 2 * sum(a for a, _ in each) / 3)
    torch.testing.assert_close(found['it.loss_background'], 3 * sum(b for _, b in each) / 3)
    assert 'it.loss_cls_object' not in found


@pytest.mark.parametrize('objects', [0, 4])
def test_gradients_reach_student_and_adapters_and_never_the_teacher(objects):
    model = pair(detectors.faster_rcnn(), detectors.faster_rcnn(24))
    found = losses(model, objects)
    assert list(found) == KEYS
    assert (found['loss_object'] == 0) == (objects == 0)
    assert found['loss_cls_background'] > 0
    sum(found.values()).backward()
    assert all(each.grad.abs().sum() > 0 for each in model.distillers.parameters())
    assert model.roi_head.bbox_head.fc_cls.weight.grad.abs().sum() > 0
    assert model.neck.lateral_convs[0].conv.weight.grad.abs().sum() > 0
    assert all(each.grad is None for each in model.sources['teacher'].model.parameters())


def test_one_stage_detectors_set_the_weights_of_classes_to_zero():
    with pytest.raises(ConfigError, match=r'the student \(RetinaNet\) has no roi_head.*set both to 0'):
        pair(detectors.retinanet(), detectors.faster_rcnn())
    with pytest.raises(ConfigError, match=r'the teacher \(RetinaNet\) has no roi_head'):
        pair(detectors.faster_rcnn(), detectors.retinanet())


@pytest.mark.parametrize('options', [dict(tau=0.0), dict(object_weight='4'), dict(adapter=3)])
def test_options_out_of_range_are_errors(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        pair(detectors.faster_rcnn(), detectors.faster_rcnn(), **options)
