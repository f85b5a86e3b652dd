import math

import pytest
import torch
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import bbox_overlaps
from mmengine.structures import InstanceData

from mmkd.distillers.detection import ld
from mmkd.distillers.detection.ld import LD
from mmkd.errors import ConfigError
from mmkd.hosts.detection.assigners import ATSS, atss
from mmkd.hosts.detection.boxes import pairwise_diou
from mmkd.hosts.detection.dense_heads import dense_head
from mmkd.hosts.detection.ground_truth import ground_truth
from mmkd.hosts.running import probe
from mmkd.taps import Taps
from mmkd.testing import detectors, models

METAS = [
    dict(img_shape=(96, 128), pad_shape=(96, 128), batch_input_shape=(96, 128)),
    dict(img_shape=(60, 64), pad_shape=(64, 64), batch_input_shape=(96, 128)),
]


def random_boxes(*shape, size=64.0):
    first = torch.rand(*shape, 2) * 0.8 * size
    return torch.cat([first, first + 4 + torch.rand(*shape, 2) * 0.6 * size], -1)


def softmax(values, tau):
    powers = [math.exp(value / tau) for value in values]
    return [power / sum(powers) for power in powers]


def divergence(student, teacher, tau):
    """Summed over bins."""
    q_s, q_t = softmax(student, tau), softmax(teacher, tau)
    return tau**2 * sum(t * math.log(t / s) for s, t in zip(q_s, q_t))


@pytest.mark.parametrize('over_bins', ['mean', 'sum'])
def test_divergence_as_plain_loops(over_bins):
    student, teacher = 3 * torch.randn(2, 7, 17, dtype=torch.float64)
    found = ld.distribution_divergence(student, teacher, 10.0, over_bins)
    expected = [
        divergence(*pair, 10.0) / (17 if over_bins == 'mean' else 1) for pair in zip(student.tolist(), teacher.tolist())
    ]
    assert found.tolist() == pytest.approx(expected, rel=1e-6)
    shifted = ld.distribution_divergence(student + 5, teacher, 10.0, over_bins)
    assert shifted.tolist() == pytest.approx(expected, rel=1e-6)


def diou(a, b):
    iou = bbox_overlaps(torch.tensor([a]), torch.tensor([b])).item()
    distance = sum(((a[i] + a[i + 2]) / 2 - (b[i] + b[i + 2]) / 2) ** 2 for i in (0, 1))
    diagonal = sum((max(a[i + 2], b[i + 2]) - min(a[i], b[i])) ** 2 for i in (0, 1))
    return iou, iou - distance / diagonal


def test_distance_iou_as_plain_loops():
    first, second = random_boxes(2, 7).double(), random_boxes(2, 5).double()
    found = pairwise_diou(first, second)
    for image in range(2):
        for i, a in enumerate(first[image].tolist()):
            for j, b in enumerate(second[image].tolist()):
                assert found[image, i, j].item() == pytest.approx(diou(a, b)[1], abs=1e-6)
    assert found.min() < 0
    assert torch.equal(pairwise_diou(first, first).diagonal(dim1=1, dim2=2), torch.ones(2, 7, dtype=torch.float64))


@pytest.mark.parametrize('gamma', [0.25, 0.0, 0.9])
def test_the_valuable_region_as_plain_loops(gamma):
    anchors = torch.cat([random_boxes(120), random_boxes(30, size=128.0)])
    boxes, inside = random_boxes(2, 4), torch.rand(2, 150) > 0.1
    valid = torch.tensor([[True] * 4, [True, True, False, False]])
    selection = atss(9, anchors, [120, 30], boxes, valid, inside)
    found = ld.valuable_region(anchors, boxes, valid, inside, selection, gamma)
    outside_a_box = False
    for image in range(2):
        for slot, anchor in enumerate(anchors.tolist()):
            weight = 0.0
            for box, there, threshold in zip(
                boxes[image].tolist(), valid[image].tolist(), selection.threshold[image].tolist()
            ):
                iou, near = diou(anchor, box)
                if there and inside[image, slot] and gamma * threshold <= near < threshold:
                    weight = max(weight, iou)
                    center = [(anchor[i] + anchor[i + 2]) / 2 for i in (0, 1)]
                    outside_a_box |= not all(box[i] < center[i] < box[i + 2] for i in (0, 1))
            assert found[image, slot].item() == pytest.approx(weight, abs=1e-6)
    assert found.count_nonzero() > 0
    assert outside_a_box or gamma > 0.5


def test_a_box_without_candidates_has_no_region():
    """Its threshold is not a number."""
    nan = torch.full((1, 1), torch.nan)
    selection = ATSS(torch.zeros(1, 1, 8, dtype=torch.bool), torch.full((1, 1, 8), 0.3), nan)
    everywhere = torch.ones(1, 8, dtype=torch.bool)
    region = ld.valuable_region(random_boxes(8), random_boxes(1, 1), everywhere[:, :1], everywhere, selection)
    assert torch.equal(region, torch.zeros(1, 8))


def test_region_losses_as_plain_loops():
    edges = torch.rand(2, 9, 4, dtype=torch.float64)
    score, region = torch.rand(2, 9, dtype=torch.float64), torch.rand(2, 9, dtype=torch.float64).round(decimals=1)
    positive = torch.rand(2, 9) > 0.5
    main = valuable = 0.0
    for image in range(2):
        for slot in range(9):
            for edge in range(4):
                value = edges[image, slot, edge].item()
                main += value * score[image, slot].item() / 4 * positive[image, slot].item()
                valuable += value * region[image, slot].item() / 16
    found = ld.region_losses(edges, score, positive, region)
    assert [each.item() for each in found] == pytest.approx([main, valuable], rel=1e-6)


@pytest.mark.parametrize('sizes', [[9], [4, 3, 2]])
def test_class_divergence_as_plain_loops(sizes):
    student, teacher = 3 * torch.randn(2, 2, 9, 5, dtype=torch.float64)
    positive = torch.rand(2, 9) > 0.5
    positive[:, 7:] = False  # nothing on the last level
    total, start = 0.0, 0
    for size in sizes:
        values = [
            divergence(student[image, slot].tolist(), teacher[image, slot].tolist(), 2.0) / 5
            for image in range(2)
            for slot in range(start, start + size)
            if positive[image, slot]
        ]
        total, start = total + sum(values) / max(len(values), 1), start + size
    found = ld.class_divergence(student, teacher, positive, 2.0, sizes)
    assert found.item() == pytest.approx(total, rel=1e-6)


def samples(objects=5, metas=METAS):
    found = []
    for meta in metas:
        sample = DetDataSample(metainfo=meta)
        labels = torch.randint(0, 3, (objects,))
        sample.gt_instances = InstanceData(bboxes=random_boxes(objects), labels=labels)
        found.append(sample)
    return found


def pair(student=None, teacher=None, **options):
    """Two networks, the distiller and both taps."""
    student = models.build(student or detectors.gfl(), seed=0)
    teacher = models.build(teacher or detectors.gfl(channels=24), seed=1).requires_grad_(False)
    distiller = LD(**options)
    distiller.prepare(student, teacher)
    distiller.setup(probe(student, distiller.student_layers), probe(teacher, distiller.teacher_layers))
    return student, teacher, distiller


def tapped(student, teacher, distiller, images):
    taps = []
    for model, layers in ((student, distiller.student_layers), (teacher, distiller.teacher_layers)):
        with Taps(model, layers) as read:
            model.bbox_head(model.extract_feat(images))
        taps.append(read)
    return taps


def confident(head):
    """As after training: distributions and class logits differ from slot to slot."""
    with torch.no_grad():
        head.gfl_reg.weight.mul_(100)
        head.gfl_cls.weight.mul_(100)


def test_positives_are_those_of_the_heads_own_targets():
    student, teacher, distiller = pair()
    data_samples = samples()
    taps = tapped(student, teacher, distiller, torch.randn(2, 3, 96, 128))
    positive, region = distiller.assign(taps[0], data_samples, dense_head(student.bbox_head))
    sizes = [level.shape[2:] for level in taps[0]['bbox_head'][0]]
    anchors, flags = student.bbox_head.get_anchors(sizes, METAS, device='cpu')
    instances = [each.gt_instances for each in data_samples]
    labels = torch.cat(student.bbox_head.get_targets(anchors, flags, instances, METAS)[1], 1)
    assert torch.equal(positive, labels < 3)
    assert positive.any()
    assert region.count_nonzero() > 0
    centers = torch.cat(student.bbox_head.prior_generator.grid_priors(sizes, device='cpu'))
    centers = (centers[:, :2] + centers[:, 2:]) / 2
    assert not region[1, (centers > 64).any(1)].any()  # the padding of the second image


def test_the_main_region_and_classes_are_as_in_mmdets_own_head():
    """mmdet's LDHead has the main region alone: the plain sum over the batch, level by level."""
    student, teacher, distiller = pair(normalize='none')
    confident(student.bbox_head)
    confident(teacher.bbox_head)
    data_samples = samples()
    taps = tapped(student, teacher, distiller, torch.randn(2, 3, 96, 128))
    config = detectors.gfl()
    config.bbox_head.update(type='LDHead', loss_ld=dict(type='KnowledgeDistillationKLDivLoss', loss_weight=0.25, T=10))
    head = models.build(config).bbox_head
    outputs, (_, soft) = taps[0]['bbox_head'], taps[1]['bbox_head']
    expected = head.loss_by_feat(*outputs, [each.gt_instances for each in data_samples], METAS, soft)
    found = distiller(*taps, data_samples)
    torch.testing.assert_close(found['loss_ld'], sum(expected['loss_ld']))
    assert found['loss_ld'] > 1e-3
    distiller.normalize = 'images'  # two images: the published value
    torch.testing.assert_close(distiller(*taps, data_samples)['loss_ld'], found['loss_ld'])


@pytest.mark.parametrize('kd_mean', ['all', 'level'])
@pytest.mark.parametrize(('normalize', 'over_bins'), [('images', 'mean'), ('weights', 'sum'), ('none', 'sum')])
def test_the_shell_weighs_each_term_with_its_options(normalize, over_bins, kd_mean):
    """From the pure functions of the two regions, each slot's divergences by plain loops."""
    options = dict(ld_weight=2.0, ld_vlr_weight=3.0, kd_weight=5.0, tau=4.0, kd_tau=3.0, gamma=0.1)
    student, teacher, distiller = pair(**options, normalize=normalize, over_bins=over_bins, kd_mean=kd_mean)
    confident(student.bbox_head)
    confident(teacher.bbox_head)
    data_samples = samples()
    data_samples[0].gt_instances.bboxes[0] = torch.tensor([20.0, 4.0, 116.0, 94.0])  # positives on a coarser level
    metas = [each.metainfo for each in data_samples] + METAS[:1]  # three images
    data_samples += samples(metas=METAS[:1])
    s_taps, t_taps = tapped(student, teacher, distiller, torch.randn(3, 3, 96, 128))
    found = distiller(s_taps, t_taps, data_samples)

    head = dense_head(student.bbox_head)
    outputs = s_taps['bbox_head']
    anchors = head.anchors(outputs)
    inside = head.inside(anchors, outputs, metas)
    truth = ground_truth(data_samples)
    selection = atss(9, anchors, head.sizes(outputs), *truth, inside)
    region = ld.valuable_region(anchors, *truth, inside, selection, 0.1)
    assert not torch.equal(region, ld.valuable_region(anchors, *truth, inside, selection))
    positive = selection.positive.any(1)
    logits, bins = (
        [
            torch.cat([each.permute(0, 2, 3, 1).reshape(3, -1, size) for each in taps['bbox_head'][index]], 1).tolist()
            for taps in (s_taps, t_taps)
        ]
        for index, size in ((0, 3), (1, 68))
    )
    main = valuable = scores = 0.0
    classes = []
    for image in range(3):
        for slot in range(len(anchors)):
            weight, chosen = region[image, slot].item(), positive[image, slot].item()
            if not weight and not chosen:
                continue
            own, other = bins[0][image][slot], bins[1][image][slot]
            edges = sum(divergence(own[i : i + 17], other[i : i + 17], 4.0) for i in range(0, 68, 17))
            edges /= 17 if over_bins == 'mean' else 1
            valuable += weight * edges / 16
            if chosen:
                score = 1 / (1 + math.exp(-max(logits[0][image][slot])))
                scores += score
                main += score * edges / 4
                classes.append((slot, divergence(logits[0][image][slot], logits[1][image][slot], 3.0) / 3))
    divisors = dict(images=(1.5, 1.5), none=(1, 1), weights=(scores, region.sum().item()))[normalize]
    groups = [len(anchors)] if kd_mean == 'all' else head.sizes(outputs)
    kd = start = 0
    for size in groups:
        values = [value for slot, value in classes if start <= slot < start + size]
        kd, start = kd + sum(values) / max(len(values), 1), start + size
    assert (kd > sum(value for _, value in classes) / len(classes) * 1.1) == (kd_mean == 'level')
    expected = dict(loss_ld=2 * main / divisors[0], loss_ld_vlr=3 * valuable / divisors[1], loss_kd=5 * kd)
    assert min(expected.values()) > 1e-3
    assert found.pop('positives').item() == pytest.approx(len(classes) / 3)
    assert found.pop('valuable').item() == pytest.approx(region.count_nonzero().item() / 3)
    assert {key: value.item() for key, value in found.items()} == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize('normalize', ['images', 'weights', 'none'])
def test_the_same_images_twice(normalize):
    student, teacher, distiller = pair(normalize=normalize)
    images, data_samples = torch.randn(2, 3, 96, 128), samples()
    once = distiller(*tapped(student, teacher, distiller, images), data_samples)
    twice = distiller(*tapped(student, teacher, distiller, images.repeat(2, 1, 1, 1)), data_samples * 2)
    for name, value in once.items():
        factor = 2 if normalize == 'none' and name in ('loss_ld', 'loss_ld_vlr') else 1
        assert value > 0
        torch.testing.assert_close(twice[name], factor * value, rtol=1e-4, atol=1e-7)


def test_divided_by_weights_it_is_a_mean_over_the_region():
    """Where all edges differ by the same, by as much, whatever the number of slots."""
    student, teacher, distiller = pair(normalize='weights', ld_weight=1.0, ld_vlr_weight=1.0)
    images = torch.randn(2, 3, 96, 128)
    with torch.no_grad():
        for model, slope in ((student, 0.0), (teacher, 1.0)):
            model.bbox_head.gfl_reg.weight.zero_()
            model.bbox_head.gfl_reg.bias.copy_(slope * torch.arange(17.0).repeat(4))
            for scale in model.bbox_head.scales:
                scale.scale.fill_(1.0)
    found = distiller(*tapped(student, teacher, distiller, images), samples())
    each = divergence([0.0] * 17, list(range(17)), 10.0) / 17
    assert found['loss_ld'].item() == pytest.approx(each, rel=1e-4)
    assert found['loss_ld_vlr'].item() == pytest.approx(each / 4, rel=1e-4)


def test_zero_for_equal_networks():
    student, teacher, distiller = pair(teacher=detectors.gfl())
    teacher.load_state_dict(student.state_dict())
    found = distiller(*tapped(student.eval(), teacher.eval(), distiller, torch.randn(2, 3, 96, 128)), samples())
    assert [found[name].item() for name in ('loss_ld', 'loss_ld_vlr', 'loss_kd')] == [0, 0, 0]
    assert found['positives'] > 0


@pytest.mark.parametrize('normalize', ['images', 'weights', 'none'])
@pytest.mark.parametrize('kd_mean', ['all', 'level'])
@pytest.mark.parametrize('objects', [0, 5])
def test_gradients_reach_the_student_alone(normalize, kd_mean, objects):
    student, teacher, distiller = pair(normalize=normalize, kd_mean=kd_mean)
    assert not list(distiller.parameters())
    found = distiller(*tapped(student, teacher, distiller, torch.randn(2, 3, 96, 128)), samples(objects))
    losses = {name: loss for name, loss in found.items() if name.startswith('loss')}
    for loss in losses.values():
        assert loss.requires_grad
        assert (loss == 0) == (objects == 0)
    sum(losses.values()).backward()
    for layer in (student.bbox_head.gfl_reg, student.bbox_head.gfl_cls, student.neck.lateral_convs[0].conv):
        assert torch.isfinite(layer.weight.grad).all()
        assert layer.weight.grad.any() == (objects > 0)
    assert all(each.grad is None for each in teacher.parameters())


def test_the_students_score_only_weighs():
    """No gradient through it: the main loss leaves the classifier alone."""
    student, teacher, distiller = pair()
    distiller(*tapped(student, teacher, distiller, torch.randn(2, 3, 96, 128)), samples())['loss_ld'].backward()
    assert student.bbox_head.gfl_reg.weight.grad.any()
    assert student.bbox_head.gfl_cls.weight.grad is None


def other_assigner():
    config = detectors.gfl()
    config.train_cfg.assigner = dict(type='MaxIoUAssigner', pos_iou_thr=0.5, neg_iou_thr=0.4, min_pos_iou=0)
    return config


@pytest.mark.parametrize(
    ('student', 'teacher', 'message'),
    [
        (detectors.retinanet, detectors.gfl, r'RetinaHead \(student\) does not predict distributions'),
        (detectors.gfl, detectors.atss, r'ATSSHead \(teacher\) does not predict distributions'),
        (detectors.gfl, lambda: detectors.gfl(bbox_head=dict(reg_max=8)), 'reg_max 16 .student. and 8'),
        (detectors.gfl, lambda: detectors.gfl(classes=5), 'classes 3 .student. and 5'),
        (other_assigner, detectors.gfl, 'MaxIoUAssigner; LD needs'),
        (
            detectors.gfl,
            lambda: detectors.gfl(
                neck=dict(num_outs=4), bbox_head=dict(anchor_generator=dict(strides=[8, 16, 32, 64]))
            ),
            'different places',
        ),
    ],
)
def test_pairs_that_cannot_be_compared_are_errors(student, teacher, message):
    with pytest.raises(ConfigError, match=message):
        pair(student(), teacher())


@pytest.mark.parametrize(
    'options',
    [
        dict(tau=0),
        dict(kd_tau=-1),
        dict(gamma=1.0),
        dict(normalize='mean'),
        dict(kd_mean='image'),
        dict(over_bins='max'),
    ],
)
def test_options_out_of_range_are_errors(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        LD(**options)
