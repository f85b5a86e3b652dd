import pytest
import torch
from mmdet.models.task_modules.coders.delta_xywh_bbox_coder import bbox2delta
from two_stage import cascade_rcnn, double_head_rcnn, grid_rcnn

from mmkd.distill import distill
from mmkd.distillers.detection.head import HEAD, assign_regions, head_loss
from mmkd.errors import ConfigError
from mmkd.hosts.detection.boxes import encode_deltas, pairwise_iou
from mmkd.hosts.detection.dense_heads import dense_head
from mmkd.hosts.detection.ground_truth import GroundTruth, ground_truth
from mmkd.hosts.detection.roi_pool import box_levels
from mmkd.hosts.detection.rois import to_rois
from mmkd.taps import Taps
from mmkd.testing import detectors, models
from mmkd.testing.batches import random_batch

KEYS = ['loss_assistant', 'loss_akd', 'loss_ckd']
NUMBERS = dict(akd_weight=2.0, ckd_weight=3.0, regions_per_image=32, candidates=64)


def boxes_of(*shape, seed=0):
    random = torch.Generator().manual_seed(seed)
    corners = 60 * torch.rand(*shape, 2, generator=random)
    return torch.cat([corners, corners + 5 + 30 * torch.rand(*shape, 2, generator=random)], -1)


def test_deltas_are_those_of_mmdet():
    priors, boxes = boxes_of(6), boxes_of(6, seed=1)
    means, stds = (0.1, 0.0, 0.2, 0.0), (0.1, 0.1, 0.2, 0.2)
    torch.testing.assert_close(encode_deltas(priors, boxes, means, stds), bbox2delta(priors, boxes, means, stds))


def test_a_region_is_of_the_object_that_it_overlaps_most():
    truth = GroundTruth(boxes_of(2, 3), torch.tensor([[True, True, False], [False, False, False]]))
    labels = torch.tensor([[2, 1, 0], [0, 0, 0]])
    regions = torch.cat([truth.boxes, truth.boxes + 2, boxes_of(2, 20, seed=2)], 1)
    found, own = assign_regions(regions, truth, labels, 7)
    for image in range(2):
        for region, label, box in zip(regions[image], found[image].tolist(), own[image]):
            overlaps = [
                (pairwise_iou(region[None], each[None]).item(), of, each)
                for each, of, there in zip(truth.boxes[image], labels[image].tolist(), truth.valid[image])
                if there
            ]
            best = max(overlaps, key=lambda entry: entry[0]) if overlaps else (0.0, 7, None)
            assert label == (best[1] if best[0] >= 0.5 else 7)
            if label != 7:
                assert torch.equal(box, best[2])
    assert {2, 1, 7} == set(found.flatten().tolist())


@pytest.mark.parametrize('agnostic', [False, True])
def test_the_assistants_loss_is_that_of_mmdet(agnostic):
    config = detectors.faster_rcnn(roi_head=dict(bbox_head=dict(reg_class_agnostic=agnostic)))
    head = models.build(config).roi_head.bbox_head
    labels = torch.tensor([0, 3, 2, 3, 1, 3])  # 3 is background
    rois, boxes = boxes_of(6), boxes_of(6, seed=1)
    logits, deltas = torch.randn(6, 4), torch.randn(6, 4 if agnostic else 12)
    found = head_loss(head, logits, deltas, rois, labels, torch.where(labels[:, None] < 3, boxes, 0.0))
    targets = head.bbox_coder.encode(rois, boxes) * (labels < 3)[:, None]
    weights = (labels < 3)[:, None].float().expand(-1, 4)
    expected = head.loss(logits, deltas, to_rois(rois[None]), labels, torch.ones(6), targets, weights)
    torch.testing.assert_close(found, expected['loss_cls'] + expected['loss_bbox'])


def pair(student=detectors.retinanet, teacher=detectors.faster_rcnn, channels=24, **options):
    own, other = models.build(student(), seed=0), models.build(teacher(channels), seed=1)
    model = distill(own, other, dict(it=dict(type='HEAD', **{**NUMBERS, **options})))
    model.init_weights()
    return model.train()


def batch_of(model, objects=4, images=2):
    return model.data_preprocessor(random_batch(model, (images, 3, 96, 128), objects), True)


def losses(model, objects=4, images=2):
    torch.manual_seed(0)
    found = model(**batch_of(model, objects, images), mode='loss')
    return {key.removeprefix('it.'): value for key, value in found.items() if key.startswith('it.')}


def test_the_assistant_starts_from_the_teachers_head_and_is_resumed():
    model = pair()
    distiller, teacher = model.distillers['it'], model.sources['teacher'].model.roi_head.bbox_head
    for own, other in zip(distiller.assistant.parameters(), teacher.parameters(), strict=True):
        assert torch.equal(own, other)
        assert own.requires_grad
        assert not other.requires_grad
        assert own is not other
    with torch.no_grad():
        distiller.assistant.fc_cls.bias.fill_(3.0)
    state = model.state_dict()
    resumed = pair()
    resumed.load_state_dict(state)
    resumed.init_weights()  # the teacher is loaded once
    assert (resumed.distillers['it'].assistant.fc_cls.bias == 3).all()
    assert (resumed.sources['teacher'].model.roi_head.bbox_head.fc_cls.bias != 3).any()
    assert list(model.plain().state_dict()) == list(models.build(detectors.retinanet()).state_dict())


def test_regions_are_predictions_at_their_locations_or_objects():
    model = pair()
    batch = batch_of(model)
    with Taps(model, model.distillers.student_layers) as taps:
        model.bbox_head(model.extract_feat(batch['inputs']))
    truth = ground_truth(batch['data_samples'])
    regions = model.distillers['it'].draw(taps, truth, batch['data_samples'])
    head = dense_head(model.bbox_head)
    outputs = taps['bbox_head']
    decoded = head.decode(head.priors(outputs), head.regression(outputs)).detach()
    decoded = decoded.clamp(min=0).minimum(torch.tensor([128.0, 96, 128, 96]))
    anchors = model.bbox_head.num_base_priors
    assert regions.boxes.shape == (2, 32, 4)
    for image in range(2):
        for box, location, predicted in zip(*(each[image] for each in regions)):
            if predicted:
                around = decoded[image, location * anchors : (location + 1) * anchors]
                assert (around - box).abs().amax(1).min() < 1e-4
            else:
                assert (truth.boxes[image] - box).abs().amax(1).min() < 1e-4
        assert 0 < (~regions.predicted[image]).sum() <= 4
        positive = pairwise_iou(regions.boxes[image], truth.boxes[image]).amax(1) >= 0.5
        assert positive.sum() <= 8


def test_boxes_are_pooled_from_the_level_of_their_size():
    model = pair()
    distiller = model.distillers['it']
    levels = [torch.randn(2, 16, *size) for size in ((12, 16), (6, 8), (3, 4))]
    boxes = torch.cat([boxes_of(2, 5), torch.tensor([0.0, 0, 240, 230]).expand(2, 1, 4)], 1)
    found = distiller.pool(levels, boxes)
    of_box = box_levels(boxes, [8, 16, 32]).flatten()
    assert set(of_box.tolist()) == {0, 1}
    for index, roi in enumerate(to_rois(boxes)):
        level = of_box[index]
        torch.testing.assert_close(found[index], distiller.poolers[level](levels[level], roi[None])[0])


def test_assistant_and_tower_learn_what_the_teachers_head_sees():
    """Over the same regions: of an assistant that is the teacher's head only the features differ."""
    model = pair()
    distiller = model.distillers['it']
    seen, teacher = {}, model.sources['teacher'].model.roi_head
    distiller.assistant.shared_fcs[0].register_forward_hook(lambda m, i, o: seen.update(own=i[0]))
    teacher.bbox_head.shared_fcs[0].register_forward_hook(lambda m, i, o: seen.update(teacher=i[0]))
    distiller.crossed.register_forward_hook(lambda m, i, o: seen.update(crossed=o))
    real, regions = distiller.draw, {}

    def draw(*given):
        regions['it'] = real(*given)
        return regions['it']

    distiller.draw = draw
    found = losses(model)
    with torch.no_grad():
        layers = []
        for head, features in ((distiller.assistant, seen['own']), (teacher.bbox_head, seen['teacher'])):
            first = head.shared_fcs[0](features.flatten(1)).relu()
            layers.append((first, head.shared_fcs[1](first).relu()))
        adapted = zip(distiller.assisted, *layers)
        akd = sum((linear(own) - other).square().mean() for linear, own, other in adapted)
        rows = regions['it'].predicted.flatten()
        ckd = (seen['crossed'] - layers[1][1])[rows].square().mean()
    torch.testing.assert_close(found['loss_akd'].detach(), 2 * akd)
    torch.testing.assert_close(found['loss_ckd'].detach(), 3 * ckd)


@pytest.mark.parametrize('objects', [0, 4])
@pytest.mark.parametrize('student', [detectors.retinanet, detectors.gfl, detectors.fcos])
def test_gradients_reach_student_and_all_parts_and_never_the_teacher(student, objects):
    model = pair(student)
    found = losses(model, objects)
    assert list(found) == KEYS
    assert all(torch.isfinite(each) for each in found.values())
    sum(found.values()).backward()
    parts = dict(model.distillers.named_parameters())
    still = {name for name, each in parts.items() if each.grad.abs().sum() == 0}
    assert still == (set() if objects else {name for name in parts if 'fc_reg' in name})
    assert all(torch.isfinite(each.grad).all() for each in parts.values())
    assert model.neck.lateral_convs[0].conv.weight.grad.abs().sum() > 0
    assert model.bbox_head.cls_convs[-1].conv.weight.grad.abs().sum() > 0
    assert all(each.grad is None for each in model.sources['teacher'].model.parameters())


def test_the_assistant_alone_teaches_backbone_and_neck():
    model = pair(akd_weight=0.0, ckd_weight=0.0)
    found = losses(model)
    assert [found[key].item() for key in KEYS[1:]] == [0, 0]
    found['loss_assistant'].backward()
    assert model.neck.lateral_convs[0].conv.weight.grad.abs().sum() > 0
    assert model.bbox_head.retina_cls.weight.grad is None or model.bbox_head.retina_cls.weight.grad.abs().sum() == 0


def test_a_cascade_teaches_by_the_named_stage():
    with pytest.raises(ConfigError, match='name the stage to learn from, teacher_stage=0 to 1'):
        pair(teacher=cascade_rcnn)
    model = pair(teacher=cascade_rcnn, teacher_stage=1)
    own, heads = model.distillers['it'].assistant, model.sources['teacher'].model.roi_head.bbox_head
    assert torch.equal(own.fc_cls.weight, heads[1].fc_cls.weight)
    assert not torch.equal(own.fc_cls.weight, heads[0].fc_cls.weight)
    assert torch.isfinite(losses(model)['loss_assistant'])


def test_each_of_several_teachers_has_an_assistant_that_starts_from_it():
    teachers = {name: models.build(detectors.faster_rcnn(24), seed=seed) for name, seed in (('a', 1), ('b', 2))}
    spec = dict(type='HEAD', teacher=['a', 'b'], **NUMBERS)
    model = distill(models.build(detectors.retinanet(), seed=0), teachers, dict(it=spec))
    model.init_weights()
    for name, teacher in teachers.items():
        own = model.distillers['it'].methods[name].assistant
        assert torch.equal(own.fc_cls.weight, teacher.roi_head.bbox_head.fc_cls.weight)
    assert torch.isfinite(losses(model.train())['loss_assistant'])


@pytest.mark.parametrize(
    ('networks', 'message'),
    [
        (dict(teacher=detectors.retinanet), 'a two-stage teacher is needed'),
        (dict(student=detectors.faster_rcnn), "'bbox_head': FasterRCNN has no such module"),
        (dict(teacher=double_head_rcnn), 'takes x_cls and x_reg'),
        (dict(teacher=grid_rcnn), 'does not predict classes and boxes'),
        (dict(teacher=lambda channels: detectors.faster_rcnn(channels, classes=5)), 'predicts 5 classes.*student 3'),
    ],
)
def test_other_networks_are_refused(networks, message):
    with pytest.raises(ConfigError, match=message):
        pair(**networks)


@pytest.mark.parametrize(
    'options', [dict(regions_per_image=0), dict(candidates=1.5), dict(akd_weight='2'), dict(adapter=3)]
)
def test_options_out_of_range_are_errors(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        pair(**options)


def test_its_weights_rise():
    assert HEAD().akd_weight() == 0
    assert HEAD().ckd_weight() == 0
    assert HEAD().assistant_weight() == 1
