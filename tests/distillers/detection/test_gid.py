import math

import pytest
import torch
from mmcv.ops import RoIAlign, nms
from mmengine.structures import InstanceData

from mmkd.distillers.detection import gid
from mmkd.distillers.detection.gid import GID
from mmkd.errors import ConfigError
from mmkd.hosts.running import probe
from mmkd.taps import Taps
from mmkd.testing import detectors, models

METAS = [dict(img_shape=(96, 128), pad_shape=(96, 128)), dict(img_shape=(80, 100), pad_shape=(96, 128))]


def logits(seed, dtype=torch.float32):
    random = torch.Generator().manual_seed(seed)
    shapes = [(2, 3, 4, 6, 8), (2, 3, 4, 3, 4)]
    return [3 * torch.randn(shape, generator=random, dtype=dtype) for shape in shapes]


def features(count=5, images=2, dtype=torch.float64):
    random = torch.Generator().manual_seed(1)
    return torch.randn(2, images, count, 4, 3, 3, generator=random, dtype=dtype)


def test_scores_are_the_largest_class_wise_difference():
    student, teacher = logits(1), logits(2)
    scores, teacher_larger = gid.instance_scores(student, teacher)
    for image in range(2):
        slot = 0
        for s, t in zip(student, teacher):
            for row in range(s.shape[3]):
                for column in range(s.shape[4]):
                    for anchor in range(s.shape[1]):
                        p_s = [1 / (1 + math.exp(-z)) for z in s[image, anchor, :, row, column].tolist()]
                        p_t = [1 / (1 + math.exp(-z)) for z in t[image, anchor, :, row, column].tolist()]
                        differences = [b - a for a, b in zip(p_s, p_t)]
                        largest = max(differences, key=abs)
                        assert scores[image, slot].item() == pytest.approx(abs(largest), abs=1e-6)
                        assert teacher_larger[image, slot].item() == (largest >= 0)
                        slot += 1
        assert slot == scores.shape[1]


def test_the_score_is_no_difference_of_maxima():
    """Both networks are equally sure, of different classes: the released code's score is 0 there."""
    student = [torch.tensor([4.0, -4.0]).view(1, 1, 2, 1, 1)]
    teacher = [torch.tensor([-4.0, 4.0]).view(1, 1, 2, 1, 1)]
    assert gid.instance_scores(student, teacher)[0].item() > 0.9


@pytest.mark.parametrize('number', [1, 4, 30])
def test_suppression_is_non_maximum_suppression(number):
    random = torch.Generator().manual_seed(3)
    first = 60 * torch.rand(2, 200, 2, generator=random)
    boxes = torch.cat([first, first + 5 + 30 * torch.rand(2, 200, 2, generator=random)], -1)
    scores = torch.rand(2, 200, generator=random)
    scores[1, 50:] = -torch.inf
    kept, valid = gid.suppress(scores, boxes, 0.3, number)
    for image in range(2):
        there = scores[image] > -torch.inf
        _, expected = nms(boxes[image, there].contiguous(), scores[image, there].contiguous(), 0.3)
        expected = torch.nonzero(there).flatten()[expected][:number]
        assert torch.equal(kept[image][valid[image]], expected)
        assert valid[image].sum() == len(expected)


def test_suppression_with_equal_scores_and_nothing_left():
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 1, 11, 11], [50, 50, 60, 60]]).expand(2, 3, 4)
    scores = torch.zeros(2, 3)
    scores[1] = -torch.inf
    _, valid = gid.suppress(scores, boxes, 0.3, 5)
    assert valid.sum(1).tolist() == [2, 0]


@pytest.mark.parametrize('distance', ['squared_l2', 'l2'])
def test_feature_loss_as_plain_loops(distance):
    student, teacher = features()
    valid = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 1, 1, 1]], dtype=torch.bool)
    total, count = 0.0, 0
    for image in range(2):
        for i in range(5):
            if valid[image, i]:
                squared = sum(x**2 for x in (teacher - student)[image, i].flatten().tolist())
                total += squared / 9 if distance == 'squared_l2' else math.sqrt(squared)
                count += 1
    loss = gid.feature_loss(student, teacher, valid, distance)
    assert loss.item() == pytest.approx(total / count, rel=1e-6)


def relation_plain_loops(student, teacher, valid):
    def distances(instances):
        found = {
            (i, j): math.sqrt(sum((a - b) ** 2 for a, b in zip(instances[i], instances[j])))
            for i in range(len(instances))
            for j in range(len(instances))
            if i != j
        }
        mean = sum(found.values()) / len(found)
        return {pair: distance / mean for pair, distance in found.items()}

    total = 0.0
    for group in range(len(valid)):
        s = [each.flatten().tolist() for each in student[group][valid[group]]]
        t = [each.flatten().tolist() for each in teacher[group][valid[group]]]
        if len(s) < 2:
            continue
        d_s, d_t = distances(s), distances(t)
        for pair in d_s:
            difference = abs(d_s[pair] - d_t[pair])
            total += (difference**2 / 2 if difference < 1 else difference - 0.5) / len(d_s)
    return total / len(valid)


@pytest.mark.parametrize('present', [[5, 5], [4, 2], [5, 1], [0, 3]])
def test_relation_loss_as_plain_loops(present):
    student, teacher = features()
    valid = torch.arange(5) < torch.tensor(present)[:, None]
    loss = gid.relation_loss(student, 4 * teacher**3, valid)
    assert loss.item() == pytest.approx(relation_plain_loops(student, 4 * teacher**3, valid), rel=1e-6)


def test_relation_loss_ignores_the_scale_of_the_features():
    student, teacher = features()
    valid = torch.ones(2, 5, dtype=torch.bool)
    expected = gid.relation_loss(student, teacher, valid)
    torch.testing.assert_close(gid.relation_loss(7.5 * student, teacher, valid), expected)


def test_the_order_of_instances_does_not_matter():
    student, teacher = features()
    valid = torch.tensor([[1, 1, 1, 0, 1], [1, 0, 1, 1, 1]], dtype=torch.bool)
    order = torch.tensor([3, 1, 4, 0, 2])
    for loss in (gid.feature_loss, gid.relation_loss):
        moved = loss(student[:, order], teacher[:, order], valid[:, order])
        torch.testing.assert_close(moved, loss(student, teacher, valid))


@pytest.mark.parametrize('loss', [gid.feature_loss, gid.relation_loss])
@pytest.mark.parametrize('present', [0, 1, 5])
def test_instance_losses_at_equal_networks(loss, present):
    """Zero with finite gradients, also for identical instances, whose distances are 0."""
    student = features()[0].clone()
    student[:, 1] = student[:, 0]
    teacher = student.clone()
    student.requires_grad_()
    value = loss(student, teacher, (torch.arange(5) < present).expand(2, 5))
    value.backward()
    assert value.item() == 0
    assert torch.isfinite(student.grad).all()


def test_response_losses_as_plain_loops():
    student, teacher = logits(1, torch.float64), logits(2, torch.float64)
    slots = sum(level[0, :, 0].numel() for level in student)
    s_boxes, t_boxes = torch.randn(2, 2, slots, 4, dtype=torch.float64)
    mask = torch.rand(2, slots) > 0.8
    flat = [
        torch.cat([level.permute(0, 3, 4, 1, 2).reshape(2, -1, 4) for level in each], 1) for each in (student, teacher)
    ]
    classification = regression = 0.0
    for image, slot in torch.nonzero(mask).tolist():
        for z_s, z_t in zip(flat[0][image, slot].tolist(), flat[1][image, slot].tolist()):
            p_s, p_t = 1 / (1 + math.exp(-z_s)), 1 / (1 + math.exp(-z_t))
            classification += p_t * math.log(p_t / p_s) + (1 - p_t) * math.log((1 - p_t) / (1 - p_s))
        regression += sum(abs(a - b) for a, b in zip(s_boxes[image, slot].tolist(), t_boxes[image, slot].tolist()))
    found = gid.response_losses(student, teacher, s_boxes, t_boxes, mask)
    count = int(mask.sum())
    assert found[0].item() == pytest.approx(classification / count, rel=1e-6)
    assert found[1].item() == pytest.approx(regression / count, rel=1e-6)


def test_the_class_response_has_the_gradient_of_soft_cross_entropy():
    student = [level.requires_grad_() for level in logits(1)]
    teacher = logits(2)
    mask = torch.ones(2, 180, dtype=torch.bool)
    boxes = torch.zeros(2, 180, 4)
    gid.response_losses(student, teacher, boxes, boxes, mask)[0].backward()
    expected = torch.autograd.grad(
        sum(
            torch.nn.functional.binary_cross_entropy_with_logits(s, t.sigmoid(), reduction='sum')
            for s, t in zip(student, teacher)
        )
        / mask.sum(),
        student,
    )
    for level, gradient in zip(student, expected):
        torch.testing.assert_close(level.grad, gradient)


def tapped(student, teacher, distiller, images=None):
    images = torch.randn(2, 3, 96, 128) if images is None else images
    taps = []
    for model, layers in ((student, distiller.student_layers), (teacher, distiller.teacher_layers)):
        with Taps(model, layers) as read:
            model.bbox_head(model.extract_feat(images))
        taps.append(read)
    return taps


def ready(distiller, student, teacher):
    distiller.prepare(student, teacher)
    distiller.setup(probe(student, distiller.student_layers), probe(teacher, distiller.teacher_layers))
    return distiller


def samples(metas=METAS):
    from mmdet.structures import DetDataSample

    return [DetDataSample(metainfo=meta) for meta in metas]


def confident(model, seed):
    """As after training: classes and boxes differ from slot to slot."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer, scale in ((model.bbox_head.retina_cls, 0.5), (model.bbox_head.retina_reg, 0.1)):
            layer.weight.normal_(std=scale, generator=random)
            layer.bias.zero_()
    return model


def flat(outputs):
    """RetinaNet's logits, (B, slots, 3), and deltas, (B, slots, 4)."""
    return tuple(
        torch.cat([level.permute(0, 2, 3, 1).reshape(2, -1, size) for level in levels], 1)
        for levels, size in zip(outputs, (3, 4))
    )


def pooled_one_by_one(levels, boxes, size, ratio):
    """(K, C, size, size), each box by mmcv's RoIAlign from the level that its area gives."""
    found = []
    for box in boxes:
        area = (box[2] - box[0]) * (box[3] - box[1])
        level = min(max(math.floor(math.log2(math.sqrt(area) / (14 * 8) + 1e-6)), 0), 2)
        pool = RoIAlign(size, 1 / (8 * 2**level), ratio, aligned=True)
        found.append(pool(levels[level].contiguous(), torch.cat([torch.zeros(1), box])[None])[0])
    return torch.stack(found)


@pytest.mark.parametrize(
    ('relation', 'distance', 'nms_pre'), [('image', 'squared_l2', 150), ('batch', 'l2', 150), ('image', 'l2', 7)]
)
def test_the_shell_weighs_each_term_at_what_mmdets_own_parts_select(relation, distance, nms_pre):
    """Image by image: mmdet's coder and assigner, mmcv's NMS and RoIAlign, and loops over instances."""
    student = confident(models.build(detectors.retinanet(), seed=0), 2)
    teacher = confident(models.build(detectors.retinanet(channels=24), seed=1), 3)
    options = dict(topk=6, nms_iou=0.4, nms_pre=nms_pre, min_box_side=12.0, pooled_size=4, sampling_ratio=3)
    weights = dict(feature_weight=2.0, relation_weight=3.0, cls_weight=5.0, bbox_weight=7.0)
    distiller = ready(GID(**options, **weights, relation=relation, feature_distance=distance), student, teacher)
    s_taps, t_taps = tapped(student, teacher, distiller)
    found = distiller(s_taps, t_taps, samples())

    (s_logits, s_deltas), (t_logits, t_deltas) = (flat(taps['bbox_head']) for taps in (s_taps, t_taps))
    head = student.bbox_head
    sizes = [level.shape[2:] for level in s_taps['neck']]
    anchors, valid = (torch.cat(each[0]) for each in head.get_anchors(sizes, METAS[:1], device='cpu'))
    assert valid.all()
    features, targets, positives = [], [], []
    for image, (height, width) in enumerate(meta['img_shape'] for meta in METAS):
        difference = t_logits[image].sigmoid() - s_logits[image].sigmoid()
        scores, classes = difference.abs().max(1)
        surer = difference.gather(1, classes[:, None]) >= 0
        deltas = torch.where(surer, t_deltas[image], s_deltas[image])
        boxes = head.bbox_coder.decode(anchors, deltas, max_shape=(height, width))
        scores, order = scores.topk(nms_pre)
        boxes = boxes[order]
        large = ((boxes[:, 2:] - boxes[:, :2]) > 12).all(1)
        assert nms_pre == 7 or not large.all()
        boxes, scores = boxes[large].detach(), scores[large].detach()
        _, kept = nms(boxes, scores, 0.4)
        boxes = boxes[kept[:6]]
        assert 2 <= len(boxes) < 6 if nms_pre == 7 else len(boxes) == 6
        own, other = ([level[image : image + 1] for level in taps['neck']] for taps in (s_taps, t_taps))
        features.append(distiller.adapters[0](pooled_one_by_one(own, boxes, 4, 3)).detach())
        targets.append(pooled_one_by_one(other, boxes, 4, 3).detach())
        truth = InstanceData(bboxes=boxes, labels=torch.zeros(len(boxes), dtype=torch.long))
        assigned = head.assigner.assign(InstanceData(priors=anchors), truth)
        positives += [(image, slot) for slot in torch.nonzero(assigned.gt_inds > 0).flatten().tolist()]
    number = sum(map(len, features))
    assert found.pop('instances').item() == number / 2

    squared = [((t - s) ** 2).sum().item() for s, t in zip(torch.cat(features), torch.cat(targets))]
    feature = sum(squared) / 16 if distance == 'squared_l2' else sum(map(math.sqrt, squared))
    groups = [each if relation == 'image' else [torch.cat(each)] for each in (features, targets)]
    related = sum(
        relation_plain_loops(s[None].double(), t[None].double(), torch.ones(1, len(s)) > 0) for s, t in zip(*groups)
    )
    classification = regression = 0.0
    for image, slot in positives:
        for s, t in zip(s_logits[image, slot].sigmoid().tolist(), t_logits[image, slot].sigmoid().tolist()):
            classification += t * math.log(t / s) + (1 - t) * math.log((1 - t) / (1 - s))
        regression += (s_deltas[image, slot] - t_deltas[image, slot]).abs().sum().item()
    expected = {
        'loss_feature': 2 * feature / number,
        'loss_relation': 3 * related / len(groups[0]),
        'loss_cls': 5 * classification / len(positives),
        'loss_bbox': 7 * regression / len(positives),
    }
    assert min(expected.values()) > 1e-3
    assert {key: value.item() for key, value in found.items()} == pytest.approx(expected, rel=1e-4)


def test_all_losses_are_zero_for_equal_networks():
    student, teacher = (models.build(detectors.retinanet(), seed=0) for _ in range(2))
    distiller = ready(GID(), student, teacher)
    losses = distiller(*tapped(student, teacher, distiller), samples())
    assert losses.pop('instances').item() == 10
    assert {name: loss.item() for name, loss in losses.items()} == dict.fromkeys(losses, pytest.approx(0, abs=1e-6))


@pytest.mark.parametrize('relation', ['image', 'batch'])
def test_gradients_reach_student_and_adapter_and_never_the_teacher(relation):
    student = models.build(detectors.retinanet(), seed=0)
    teacher = models.build(detectors.retinanet(channels=24), seed=1)
    distiller = ready(GID(relation=relation), student, teacher)
    losses = distiller(*tapped(student, teacher, distiller), samples())
    sum(loss for name, loss in losses.items() if name.startswith('loss')).backward()
    assert all(loss.requires_grad for name, loss in losses.items() if name.startswith('loss'))
    assert all(parameter.grad.abs().sum() > 0 for parameter in distiller.parameters())
    assert len(list(distiller.parameters())) == 2
    assert student.neck.lateral_convs[0].conv.weight.grad.abs().sum() > 0
    assert student.bbox_head.retina_reg.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in teacher.parameters() if parameter.requires_grad)


@pytest.mark.parametrize('topk', [1, 10])
def test_few_or_no_instances_still_give_every_gradient(topk):
    """An image too small for any box, a batch of one, one instance: finite, and the adapter takes part."""
    student = models.build(detectors.retinanet(), seed=0)
    teacher = models.build(detectors.retinanet(channels=24), seed=1)
    for side in (0.0, 1000.0):
        distiller = ready(GID(topk=topk, min_box_side=side), student, teacher)
        losses = distiller(*tapped(student, teacher, distiller, torch.randn(1, 3, 96, 128)), samples(METAS[:1]))
        assert losses['instances'].item() == (0 if side else topk)
        total = sum(loss for name, loss in losses.items() if name.startswith('loss'))
        assert torch.isfinite(total)
        assert (total == 0) == bool(side)
        total.backward()
        gradients = [each.grad for each in (*distiller.parameters(), *student.parameters()) if each.requires_grad]
        assert all(torch.isfinite(each).all() for each in gradients if each is not None)
        assert all(each.grad is not None for each in distiller.parameters())


def test_selected_boxes_are_the_surer_networks_inside_the_image():
    student = models.build(detectors.retinanet(), seed=0)
    teacher = models.build(detectors.retinanet(channels=24), seed=1)
    with torch.no_grad():
        teacher.bbox_head.retina_cls.bias.fill_(6.0)  # the teacher is surer everywhere
    distiller = ready(GID(min_box_side=10), student, teacher)
    taps = tapped(student, teacher, distiller)
    boxes, scores, valid = distiller.select(*taps, METAS)
    assert valid.all()
    assert (scores[:, :-1] >= scores[:, 1:]).all()
    for image, meta in enumerate(METAS):
        height, width = meta['img_shape']
        assert (boxes[image] >= 0).all()
        assert (boxes[image, :, 2] <= width).all()
        assert (boxes[image, :, 3] <= height).all()
        assert ((boxes[image, :, 2:] - boxes[image, :, :2]) > 10).all()
    head = gid.dense_head(teacher.bbox_head)
    outputs = taps[1]['bbox_head']
    predicted = head.decode(head.priors(outputs).expand(2, -1, -1), head.regression(outputs))
    limits = torch.tensor([[128.0, 96, 128, 96], [100, 80, 100, 80]])[:, None]
    predicted = torch.minimum(predicted.clamp(min=0), limits)
    distance = (boxes[:, :, None] - predicted[:, None]).abs().amax(3).amin(2)
    assert distance.max() < 1e-4


def test_another_packages_head_is_read_once_it_is_registered():
    """A head that puts boxes before classes; nothing in mmkd knows it."""
    from mmdet.models.dense_heads import RetinaHead
    from mmdet.registry import MODELS

    from mmkd.hosts.detection.dense_heads import AnchorDenseHead, dense_head

    class BoxesFirst(RetinaHead):
        def forward(self, features):
            classes, boxes = super().forward(features)
            return boxes, classes

    @dense_head.register(BoxesFirst)
    class BoxesFirstDenseHead(AnchorDenseHead):
        def class_logits(self, outputs):
            return super().class_logits(outputs[::-1])

        def regression(self, outputs):
            return super().regression(outputs[::-1])

    MODELS.register_module(module=BoxesFirst, force=True)
    pairs = []
    for head in ('RetinaHead', 'BoxesFirst'):
        configs = [detectors.retinanet(channels=channels, bbox_head=dict(type=head)) for channels in (16, 24)]
        student, teacher = (models.build(config, seed=seed) for seed, config in enumerate(configs))
        distiller = ready(GID(adapter=dict(type='ConvAdapter', init_std=0.1)), student, teacher)
        pairs.append((distiller, student, teacher))
    pairs[1][0].load_state_dict(pairs[0][0].state_dict())
    images = torch.randn(2, 3, 96, 128)
    expected, found = (pair[0](*tapped(*pair[1:], pair[0], images), samples()) for pair in pairs)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


def test_an_overflow_in_the_forward_pass_gives_nan_and_no_crash():
    """Under AMP the gradient scaler then skips the step."""
    student = models.build(detectors.retinanet(), seed=0)
    teacher = models.build(detectors.retinanet(), seed=1)
    distiller = ready(GID(), student, teacher)
    for value in (float('nan'), float('inf')):
        images = torch.randn(2, 3, 96, 128)
        images[0, 0, 50, 50] = value
        losses = distiller(*tapped(student, teacher, distiller, images), samples())
        assert not torch.isfinite(sum(loss for name, loss in losses.items() if name.startswith('loss')))


def test_the_value_does_not_depend_on_the_number_of_images():
    student = models.build(detectors.retinanet(), seed=0)
    teacher = models.build(detectors.retinanet(channels=24), seed=1)
    distiller = ready(GID(), student, teacher)
    image = torch.randn(1, 3, 96, 128)
    one = distiller(*tapped(student, teacher, distiller, image), samples(METAS[:1]))
    three = distiller(*tapped(student, teacher, distiller, image.repeat(3, 1, 1, 1)), samples(METAS[:1] * 3))
    for name in one:
        torch.testing.assert_close(three[name], one[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ('options', 'teacher', 'message'),
    [
        (dict(), dict(classes=5), '3 .student. and 5 .teacher. classes'),
        (dict(), dict(bbox_head=dict(bbox_coder=dict(target_stds=[0.1] * 4))), 'different units'),
        (dict(), dict(bbox_head=dict(bbox_coder=dict(add_ctr_clamp=True))), 'does not predict boxes as deltas'),
        (dict(), dict(bbox_head=dict(anchor_generator=dict(ratios=[1.0]))), 'different slots'),
        (dict(), dict(bbox_head=dict(anchor_generator=dict(octave_base_scale=6))), 'different anchors'),
        (dict(adapter=None), dict(channels=24), '16 and 24 channels with adapter=None'),
        (dict(layer='backbone'), dict(), "'backbone' of the student has 4 levels and 'bbox_head' 3 strides"),
    ],
)
def test_pairs_that_cannot_be_compared_are_errors(options, teacher, message):
    with pytest.raises(ConfigError, match=message):
        ready(GID(**options), models.build(detectors.retinanet()), models.build(detectors.retinanet(**teacher)))


def test_a_frozen_neck_is_an_error():
    student, teacher = (models.build(detectors.retinanet(), seed=seed) for seed in (0, 1))
    distiller = ready(GID(), student, teacher)
    student.backbone.requires_grad_(False)
    student.neck.requires_grad_(False)
    with pytest.raises(ConfigError, match="'neck': its output has no gradient"):
        distiller(*tapped(student, teacher, distiller), samples())


@pytest.mark.parametrize('options', [dict(relation='all'), dict(feature_distance='l1'), dict(topk=0), dict(nms_pre=5)])
def test_options_out_of_range_are_errors(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        GID(**options)
