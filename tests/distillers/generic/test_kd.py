import math

import pytest
import torch
import torch.nn.functional as F

from mmkd.distill import distill
from mmkd.distillers.generic.kd import KD, REDUCTIONS, binary_divergence, pixel_divergence
from mmkd.errors import ConfigError
from mmkd.hosts.running import probe
from mmkd.taps import Taps
from mmkd.testing import detectors, models, segmentors
from mmkd.testing.batches import random_batch
from mmkd.testing.closed_form import closed_form_inputs


def softmax(values, tau):
    powers = [math.exp(value / tau) for value in values]
    return [power / sum(powers) for power in powers]


def plain_loops(student, teacher, tau, reduction, valid):
    """The formula, pixel by pixel, in float64."""
    batch, classes, height, width = student.shape
    total, counted = 0.0, 0
    for b in range(batch):
        image, own = 0.0, 0
        for y in range(height):
            for x in range(width):
                if valid is None or valid[b, y, x]:
                    q = softmax(student[b, :, y, x].tolist(), tau)
                    p = softmax(teacher[b, :, y, x].tolist(), tau)
                    image += sum(a * math.log(a / c) for a, c in zip(p, q))
                    own += 1
        total += image / max(own, 1) if reduction == 'image_sum' else image
        counted += own
    divisor = {'pixel_mean': counted, 'element_mean': counted * classes}.get(reduction, 1)
    return tau**2 * total / max(divisor, 1)


@pytest.mark.parametrize(
    ('reduction', 'value'), [('pixel_mean', 1.1557732), ('element_mean', 0.2311546), ('sum', 55.4771118)]
)
def test_the_values_that_public_implementations_give(reduction, value):
    """CIRKD's, and MMRazor's ``mean`` and ``sum``."""
    student, teacher = closed_form_inputs((2, 5, 4, 6))
    assert pixel_divergence(student, teacher, reduction=reduction).item() == pytest.approx(value, rel=1e-5)


def test_skds_own_value_is_a_cross_entropy():
    """Which adds the teacher's entropy, that no student can change."""
    student, teacher = closed_form_inputs((2, 5, 4, 6))
    log_p = teacher.log_softmax(1)
    entropy = -(log_p.exp() * log_p).sum(1).mean((1, 2)).sum()
    found = pixel_divergence(student, teacher, reduction='image_sum') + entropy
    assert found.item() == pytest.approx(4.2669063, rel=1e-5)


@pytest.mark.parametrize('reduction', REDUCTIONS)
@pytest.mark.parametrize('tau', [0.5, 1.0, 4.0])
@pytest.mark.parametrize('masked', [False, True])
def test_the_formula_as_plain_loops(reduction, tau, masked):
    student, teacher = 2 * torch.randn(2, 2, 5, 3, 4, dtype=torch.float64)
    valid = torch.rand(2, 3, 4) < torch.tensor([0.3, 0.9])[:, None, None] if masked else None
    found = pixel_divergence(student, teacher, tau, reduction, valid)
    assert found.item() == pytest.approx(plain_loops(student, teacher, tau, reduction, valid), rel=1e-6)


@pytest.mark.parametrize('reduction', REDUCTIONS)
def test_a_single_valid_pixel_is_a_mean_of_one(reduction):
    student, teacher = torch.randn(2, 2, 5, 3, 4, dtype=torch.float64)
    valid = torch.zeros(2, 3, 4, dtype=torch.bool)
    valid[1, 2, 3] = True
    found = pixel_divergence(student, teacher, 1.0, reduction, valid)
    assert found.item() == pytest.approx(plain_loops(student, teacher, 1.0, reduction, valid), rel=1e-6)


def test_weights_of_one_reduction_are_those_of_another():
    student, teacher = torch.randn(2, 3, 5, 4, 6)
    mean = pixel_divergence(student, teacher)
    for reduction, factor in (('image_sum', 3), ('element_mean', 1 / 5), ('sum', 3 * 24)):
        torch.testing.assert_close(pixel_divergence(student, teacher, reduction=reduction), factor * mean)


@pytest.mark.parametrize('reduction', REDUCTIONS)
def test_nothing_valid_is_a_differentiable_zero(reduction):
    student, teacher = torch.randn(1, 2, 5, 4, 6).requires_grad_(), torch.randn(2, 5, 4, 6)
    loss = pixel_divergence(student[0], teacher, reduction=reduction, valid=torch.zeros(2, 4, 6, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert not student.grad.any()


def test_what_is_not_valid_gets_no_gradient():
    student, teacher = torch.randn(2, 5, 4, 6, requires_grad=True), torch.randn(2, 5, 4, 6)
    valid = torch.rand(2, 4, 6) < 0.5
    pixel_divergence(student, teacher, valid=valid).backward()
    assert (student.grad.abs().sum(1) > 0).equal(valid)


@pytest.mark.parametrize('reduction', REDUCTIONS)
def test_zero_for_equal_inputs_and_unchanged_by_a_constant_of_a_pixel(reduction):
    student, teacher = torch.randn(2, 2, 5, 4, 6, dtype=torch.float64)
    assert pixel_divergence(student, student, reduction=reduction).item() == 0
    offset = 5 * torch.randn(2, 1, 4, 6)
    expected = pixel_divergence(student, teacher, reduction=reduction)
    torch.testing.assert_close(pixel_divergence(student + offset, teacher, reduction=reduction), expected)


@pytest.mark.parametrize('reduction', ['pixel_mean', 'element_mean'])
def test_a_batch_of_one_weighs_as_much_as_a_larger_one(reduction):
    student, teacher = torch.randn(2, 1, 5, 4, 6)
    one = pixel_divergence(student, teacher, reduction=reduction)
    three = [each.repeat(3, 1, 1, 1) for each in (student, teacher)]
    torch.testing.assert_close(pixel_divergence(*three, reduction=reduction), one)


def test_channels_last_inputs_and_extreme_logits():
    student, teacher = torch.randn(2, 2, 5, 4, 6)
    expected = pixel_divergence(student, teacher)
    last = [each.contiguous(memory_format=torch.channels_last) for each in (student, teacher)]
    torch.testing.assert_close(pixel_divergence(*last), expected)
    student[0, 0, 0, 0] += 200
    teacher[0, 1, 0, 0] += 200
    student.requires_grad_()
    loss = pixel_divergence(student, teacher)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()


def test_the_gradient_is_that_of_a_soft_cross_entropy_and_the_teacher_has_none():
    student, teacher = (torch.randn(2, 5, 4, 6, requires_grad=True) for _ in range(2))
    pixel_divergence(student, teacher).backward()
    expected = (student.softmax(1) - teacher.softmax(1)).detach() / 48
    torch.testing.assert_close(student.grad, expected)
    assert teacher.grad is None


def sigmoid(value, tau=1.0):
    return 1 / (1 + math.exp(-value / tau))


@pytest.mark.parametrize('tau', [0.5, 1.0, 4.0])
@pytest.mark.parametrize('weighted', [False, True])
def test_sigmoid_scores_as_plain_loops(tau, weighted):
    student, teacher = 2 * torch.randn(2, 2, 3, 7, dtype=torch.float64)
    weights = torch.rand(2, 3, 7, dtype=torch.float64) if weighted else None
    total, objects = 0.0, 0.0
    for b in range(2):
        for a in range(7):
            objects += max(sigmoid(value) for value in teacher[b, :, a].tolist())
            for c in range(3):
                p, q = (sigmoid(each[b, c, a].item(), tau) for each in (teacher, student))
                each = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
                total += each * (weights[b, c, a].item() if weighted else 1)
    expected = tau**2 * total / max(objects, 1)
    assert binary_divergence(student, teacher, tau, weights).item() == pytest.approx(expected, rel=1e-6)


def test_sigmoid_scores_of_nothing_but_background():
    """The divisor does not go below one object."""
    student, teacher = torch.zeros(1, 2, 3, requires_grad=True), torch.full((1, 2, 3), -20.0)
    loss = binary_divergence(student, teacher)
    assert loss.item() == pytest.approx(6 * math.log(2), rel=1e-5)
    loss.backward()
    torch.testing.assert_close(student.grad, torch.full((1, 2, 3), 0.5))


def test_sigmoid_scores_are_finite_and_zero_for_equal_ones():
    student = torch.tensor([[[300.0, -300.0, 0.0]]], requires_grad=True)
    assert binary_divergence(student, student.detach()).item() == 0
    loss = binary_divergence(student, -student.detach())
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()


def test_positions_have_weights_of_their_own():
    student, teacher = torch.randn(2, 2, 5, 3, 4)
    weights = torch.rand(2, 3, 4)
    valid = torch.rand(2, 3, 4) < 0.5
    found = pixel_divergence(student, teacher, reduction='sum', valid=valid, weights=weights)
    log_s, log_t = student.log_softmax(1), teacher.log_softmax(1)
    torch.testing.assert_close(found, ((log_t.exp() * (log_t - log_s)).sum(1) * weights * valid).sum())


def test_no_region_at_all_is_zero():
    student = torch.zeros(0, 4, requires_grad=True)
    loss = pixel_divergence(student, torch.zeros(0, 4))
    assert loss.item() == 0
    loss.backward()


# --- as a distiller


def pair(tmp_path, teacher, student=None, **options):
    checkpoint = models.save_weights(teacher, tmp_path / 'teacher.pth')
    model = distill(
        models.build(student or segmentors.pspnet(), seed=0),
        dict(config=teacher, checkpoint=checkpoint),
        dict(kd=dict(type='KD', **options)),
    )
    model.sources['teacher'].load()
    return model.train()


def tapped(model, objects=4):
    """A batch, the taps of both networks and the loss."""
    data = model.data_preprocessor(random_batch(model, (2, 3, 64, 96), objects), True)
    teacher = model.sources['teacher'](data['inputs'], data['data_samples'])
    with Taps(model, model.distillers.student_layers) as student:
        model.decode_head.forward(model.extract_feat(data['inputs']))
    return data, student, teacher, model.distillers.kd(student, teacher, data['data_samples'])['loss']


@pytest.mark.parametrize('reduction', REDUCTIONS)
def test_ignored_pixels_are_left_out_unless_labels_are_not_used(reduction, tmp_path):
    layer = 'decode_head.conv_seg'
    model = pair(tmp_path, segmentors.pspnet(24, base=16), tau=2.0, loss_weight=3.0, reduction=reduction)
    data, student, teacher, loss = tapped(model, objects=1)
    labels = torch.stack([sample.gt_sem_seg.data[0, 4::8, 4::8] for sample in data['data_samples']])
    valid = labels != 255
    assert 0 < valid.sum() < valid.numel()
    expected = plain_loops(student[layer][0].double(), teacher[layer][0].double(), 2.0, reduction, valid)
    assert loss.item() == pytest.approx(3 * expected, rel=1e-4)
    model.distillers.kd.reader.use_labels = False
    found = model.distillers.kd(student, teacher, None)['loss']
    torch.testing.assert_close(found, 3 * pixel_divergence(student[layer][0], teacher[layer][0], 2.0, reduction))
    assert abs(found.item() - loss.item()) > 1e-3


@pytest.mark.parametrize(
    'teacher',
    [segmentors.pspnet(24, base=16), segmentors.deeplabv3(24), segmentors.segformer(24)],
    ids=lambda c: c.decode_head.type,
)
@pytest.mark.parametrize('label_size', [False, True])
def test_a_teacher_of_other_widths_and_strides(teacher, label_size, tmp_path):
    model = pair(tmp_path, teacher, label_size=label_size)
    data, student, teacher, loss = tapped(model)
    (s,), (t,) = student['decode_head.conv_seg'], teacher['decode_head.conv_seg']
    labels = torch.cat([sample.gt_sem_seg.data for sample in data['data_samples']])
    stride = 1 if label_size else 64 // t.shape[2]
    resized = [F.interpolate(each, (64 // stride, 96 // stride), mode='bilinear') for each in (s, t)]
    torch.testing.assert_close(
        loss, pixel_divergence(*resized, valid=labels[:, stride // 2 :: stride, stride // 2 :: stride] != 255)
    )
    loss.backward()
    assert model.decode_head.conv_seg.weight.grad.any()
    assert model.backbone.layer1[0].conv1.weight.grad.any()
    assert all(each.grad is None for each in model.sources['teacher'].model.parameters())
    assert not list(model.distillers.parameters())


@pytest.mark.parametrize('label_size', [False, True])
def test_a_training_step_is_finite_and_zero_without_labels(label_size, tmp_path):
    model = pair(tmp_path, segmentors.deeplabv3(24), label_size=label_size)
    for objects in (4, 0):
        data = model.data_preprocessor(random_batch(model, (2, 3, 64, 96), objects), True)
        loss = model(**data, mode='loss')['kd.loss']
        assert torch.isfinite(loss)
        assert (loss > 0) == (objects > 0)
        assert loss.requires_grad


def test_auxiliary_logits(tmp_path):
    """The teacher's auxiliary head runs too, though its tensor mode leaves it out."""
    layer = 'auxiliary_head.conv_seg'
    model = pair(tmp_path, segmentors.pspnet(24), layer=layer)
    data = model.data_preprocessor(random_batch(model, (2, 3, 64, 96)), True)
    assert model(**data, mode='loss')['kd.loss'] > 0
    assert model.sources['teacher'].layers == (layer,)


def test_zero_for_equal_networks(tmp_path):
    model = pair(tmp_path, segmentors.pspnet())
    model.load_state_dict(torch.load(tmp_path / 'teacher.pth', weights_only=True)['state_dict'])
    model.eval()
    *_, loss = tapped(model)
    assert loss.item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize('label_size', [False, True])
def test_frozen_logits_are_an_error(label_size, tmp_path):
    model = pair(tmp_path, segmentors.pspnet(), label_size=label_size).requires_grad_(False)
    with pytest.raises(ConfigError, match=r"'decode_head.conv_seg': its output has no gradient"):
        tapped(model)


def test_an_image_without_labels_is_an_error(tmp_path):
    model = pair(tmp_path, segmentors.pspnet())
    data, student, teacher, _ = tapped(model)
    del data['data_samples'][1].gt_sem_seg
    with pytest.raises(ConfigError, match='no gt_sem_seg'):
        model.distillers.kd(student, teacher, data['data_samples'])


@pytest.mark.parametrize(
    ('student', 'teacher', 'options', 'message'),
    [
        (dict(), dict(classes=7), {}, "'decode_head.conv_seg' puts out 19 channels and .* of the teacher 7"),
        (dict(), dict(), dict(layer='decode_head.bottleneck', teacher_layer='decode_head.conv_seg'), '16 channels and'),
        (dict(classes=1), dict(classes=1), {}, 'puts out one channel.*out_channels=2'),
    ],
)
def test_layers_that_cannot_be_compared_are_errors(student, teacher, options, message):
    distiller = KD(**options)
    networks = []
    for changes in (student, teacher):
        if changes.get('classes') == 1:  # mmseg's own head of one channel
            head = dict(out_channels=1, threshold=0.3, loss_decode=dict(use_sigmoid=True))
            changes = dict(classes=2, decode_head=head)
        networks.append(models.build(segmentors.pspnet(**changes)))
    distiller.prepare(*networks)
    taps = map(probe, networks, (distiller.student_layers, distiller.teacher_layers))
    with pytest.raises(ConfigError, match=message):
        distiller.setup(*taps)


@pytest.mark.parametrize(
    'options', [dict(tau=0), dict(tau=-1.0), dict(tau='4'), dict(reduction='mean'), dict(loss_weight='2')]
)
def test_options_out_of_range_are_errors(options):
    with pytest.raises(ConfigError, match=next(iter(options)).removeprefix('loss_')):
        KD(**options)


@pytest.mark.parametrize('make', [detectors.retinanet, detectors.fcos, detectors.gfl])
def test_a_dense_head_by_hand(make, tmp_path):
    model = pair(tmp_path, make(), make(), tau=2.0, loss_weight=3.0)
    data = model.data_preprocessor(random_batch(model, (2, 3, 64, 96)), True)
    found = model(**data, mode='loss')['kd.loss']
    with torch.no_grad():
        own, other = (
            network.bbox_head(network.extract_feat(data['inputs']))[0]
            for network in (model, model.sources['teacher'].model)
        )
    slots = [
        torch.cat([each.unflatten(1, (-1, 3)).transpose(1, 2).flatten(2) for each in levels], 2)
        for levels in (own, other)
    ]
    torch.testing.assert_close(found, 3 * binary_divergence(*slots, 2.0))


def test_regions_by_hand(tmp_path):
    """The teacher's second stage is run over the student's own regions."""
    model = pair(tmp_path, detectors.faster_rcnn(), detectors.faster_rcnn())
    data = model.data_preprocessor(random_batch(model, (2, 3, 64, 96)), True)
    with Taps(model, ['roi_head.bbox_roi_extractor:input', 'roi_head.bbox_head']) as taps:
        found = model(**data, mode='loss')['kd.loss']
    teacher = model.sources['teacher'].model
    with torch.no_grad():
        features = teacher.extract_feat(data['inputs'])
        rois = taps['roi_head.bbox_roi_extractor:input'][1]
        extractor = teacher.roi_head.bbox_roi_extractor
        levels = [level.contiguous() for level in features[: extractor.num_inputs]]
        logits = teacher.roi_head.bbox_head(extractor(levels, rois))[0]
    torch.testing.assert_close(found, pixel_divergence(taps['roi_head.bbox_head'][0], logits), rtol=1e-4, atol=1e-6)


RETINANET, FASTER = detectors.retinanet(), detectors.faster_rcnn()


@pytest.mark.parametrize(
    ('network', 'options', 'message'),
    [
        (
            RETINANET,
            dict(label_size=True),
            'label_size=True: is of the pixels of a segmentor, and the student is a RetinaNet; l',
        ),
        (RETINANET, dict(use_labels=False), 'use_labels=False: is of the pixels'),
        (
            RETINANET,
            dict(reduction='sum'),
            "reduction='sum': is of softmax scores, and those of 'bbox_head' are sigmoid, .*; l",
        ),
        (FASTER, dict(label_size=True), 'label_size=True: is of the pixels'),
        (FASTER, dict(use_labels=False), 'use_labels=False: is of the pixels'),
        (FASTER, dict(layer='rpn_head', reduction='sum'), "reduction='sum': .* 'rpn_head'"),
        (
            FASTER,
            dict(teacher_layer='backbone'),
            "teacher_layer='backbone': the teacher's regions are pooled from its 'neck'",
        ),
    ],
)
def test_options_that_a_detectors_head_does_not_have_are_errors(network, options, message):
    with pytest.raises(ConfigError, match=f'^distillers.kd: {message}'):
        distill(models.build(network), models.build(network), dict(kd=dict(type='KD', **options)))


def test_a_reduction_of_regions(tmp_path):
    model = pair(tmp_path, FASTER, FASTER, reduction='sum')
    data = model.data_preprocessor(random_batch(model, (2, 3, 64, 96)), True)
    assert model(**data, mode='loss')['kd.loss'] > 0


@pytest.mark.parametrize(
    ('student', 'teacher', 'options', 'message'),
    [
        (
            detectors.retinanet(),
            detectors.retinanet(classes=4),
            {},
            'the heads predict 3 .student. and 4 .teacher. classes',
        ),
        (detectors.retinanet(), detectors.fcos(), {}, 'the heads have different slots'),
        (detectors.retinanet(), detectors.faster_rcnn(), {}, "'bbox_head': FasterRCNN has no such module"),
        (detectors.faster_rcnn(), detectors.retinanet(), {}, "RetinaNet. has no 'roi_head' with boxes"),
        (detectors.faster_rcnn(), detectors.faster_rcnn(classes=5), {}, "'roi_head.bbox_head' differs in classes"),
        (detectors.retinanet(), detectors.retinanet(), dict(layer=['bbox_head']), 'of a detector one head is compared'),
    ],
)
def test_detectors_that_cannot_be_compared_are_errors(student, teacher, options, message):
    with pytest.raises(ConfigError, match=message):
        distill(models.build(student), models.build(teacher), dict(kd=dict(type='KD', **options)))
