import math

import pytest
import torch
from mmengine.registry import DefaultScope

from mmkd.distill import distill
from mmkd.distillers.detection import chen
from mmkd.distillers.detection.chen import Chen
from mmkd.errors import ConfigError
from mmkd.taps import Taps
from mmkd.testing import detectors, models
from mmkd.testing.batches import random_batch


def softmax(logits, tau=1.0):
    values = [math.exp(each / tau) for each in logits]
    return [each / sum(values) for each in values]


def divergence(student, teacher, background=1.5, tau=1.0):
    """Of one row of logits, the background last; the paper's cross-entropy less that of the teacher with itself."""
    s, t = softmax(student, tau), softmax(teacher, tau)
    weights = [1.0] * (len(s) - 1) + [background]
    return sum(-w * b * math.log(a) + w * b * math.log(b) for w, a, b in zip(weights, s, t))


def bounded(student, teacher, target, margin=0.0):
    error, bound = (sum((a - y) ** 2 for a, y in zip(each, target)) for each in (student, teacher))
    return error if error + margin > bound else 0.0


@pytest.mark.parametrize(('background', 'tau'), [(1.5, 1.0), (1.0, 1.0), (0.3, 2.0)])
def test_divergence_as_plain_loops(background, tau):
    student, teacher = 2 * torch.randn(2, 7, 5, dtype=torch.float64)
    found = chen.weighted_divergence(student, teacher, background, tau)
    for row in range(7):
        expected = divergence(student[row].tolist(), teacher[row].tolist(), background, tau)
        assert found[row].item() == pytest.approx(expected, rel=1e-6)


def test_without_weights_it_has_the_gradient_of_plain_soft_cross_entropy():
    student, teacher = torch.randn(2, 7, 5, dtype=torch.float64)
    student.requires_grad_()
    found = torch.autograd.grad(chen.weighted_divergence(student, teacher, 1.0).sum(), student)
    expected = torch.nn.functional.cross_entropy(student, teacher.softmax(1), reduction='sum')
    torch.testing.assert_close(found, torch.autograd.grad(expected, student))


@pytest.mark.parametrize('margin', [0.0, 0.7])
def test_bounded_error_as_plain_loops(margin):
    student, teacher, target = torch.randn(3, 200, 4, dtype=torch.float64)
    found = chen.bounded_error(student, teacher, target, margin)
    for row in range(200):
        expected = bounded(student[row].tolist(), teacher[row].tolist(), target[row].tolist(), margin)
        assert found[row].item() == pytest.approx(expected, rel=1e-6)
    assert 20 < (found == 0).sum() < 180


def test_the_bound_ends_where_the_student_is_better_by_the_margin_and_has_no_gradient():
    target, teacher = torch.zeros(3, 4), torch.tensor([1.0, 0, 0, 0]).expand(3, 4).clone().requires_grad_()
    student = torch.tensor([[1.0], [0.75], [0.5]]) * torch.tensor([1.0, 0, 0, 0])
    assert chen.bounded_error(student, teacher, target, 0.0).tolist() == [0, 0, 0]
    loss = chen.bounded_error(student.requires_grad_(), teacher, target, 0.5)
    assert loss.tolist() == [1.0, 0.75**2, 0]
    loss.sum().backward()
    assert teacher.grad is None
    assert student.grad[:, 0].tolist() == [2.0, 1.5, 0]


def pair(tmp_path, same=False, student=None, teacher=None, **options):
    teacher = detectors.faster_rcnn(16 if same else 24, **(teacher or {}))
    checkpoint = models.save_weights(teacher, tmp_path / 'teacher.pth')
    torch.manual_seed(0)
    model = distill(
        models.build(detectors.faster_rcnn(**(student or {})), seed=0),
        dict(config=teacher, checkpoint=checkpoint),
        dict(it=dict(type='Chen', **options)),
    )
    if same:
        model.load_state_dict(torch.load(checkpoint, weights_only=True)['state_dict'], strict=False)
    model.sources['teacher'].load()
    return model.train()


def losses(model, objects=4, images=2):
    torch.manual_seed(0)
    batch = model.data_preprocessor(random_batch(model, (images, 3, 96, 128), objects), True)
    found = model(**batch, mode='loss')
    return {key.removeprefix('it.'): value for key, value in found.items() if key.startswith('it.')}, batch


@pytest.mark.parametrize('agnostic', [False, True])
def test_the_shell_compares_what_the_students_own_losses_sampled(agnostic, tmp_path, monkeypatch):
    """From the arguments of mmdet's loss functions, in their layout, by plain loops over anchors and RoIs."""
    head = dict(roi_head=dict(bbox_head=dict(reg_class_agnostic=agnostic)))
    weights = dict(rpn_cls_weight=0.25, rpn_bbox_weight=0.3, cls_weight=0.6, bbox_weight=0.7, hint_weight=0.1)
    options = dict(**weights, margin=10.0, bg_cls_weight=1.7, tau=2.0)
    model = pair(tmp_path, student=head, teacher=head, **options)
    # predictions at the start are all near 0; and the teacher is not to be better everywhere
    for seed, module in enumerate((model, model.sources['teacher'].model)):
        for layer in (module.rpn_head.rpn_cls, module.rpn_head.rpn_reg):
            layer.bias.data.normal_(generator=torch.Generator().manual_seed(seed))
            layer.bias.data *= 1 + seed
            layer.weight.data *= 3
        module.roi_head.bbox_head.fc_cls.weight.data *= 10
        module.roi_head.bbox_head.fc_reg.weight.data *= 30
    seen = {}
    rpn_loss, box_loss = model.rpn_head.loss_by_feat_single, model.roi_head.bbox_head.loss

    def record_rpn(*args, **kwargs):
        seen.setdefault('rpn', []).append(args)
        return rpn_loss(*args, **kwargs)

    def record_boxes(*args, **kwargs):
        seen['rcn'] = args
        return box_loss(*args, **kwargs)

    monkeypatch.setattr(model.rpn_head, 'loss_by_feat_single', record_rpn)
    monkeypatch.setattr(model.roi_head.bbox_head, 'loss', record_boxes)
    found, batch = losses(model)
    teacher = model.sources['teacher'].model
    with torch.no_grad(), DefaultScope.overwrite_default_scope('mmdet'):
        # mmcv's RoIAlign reads memory in the order of NCHW
        features = [level.contiguous() for level in teacher.extract_feat(batch['inputs'])]
        t_rpn = teacher.rpn_head(features)
        t_rcn = teacher.roi_head._bbox_forward(features, seen['rcn'][2])

    soft = box = without = count = positives = 0
    for level, (scores, deltas, _, _, weights, targets, box_weights, *_) in enumerate(seen['rpn']):
        for image in range(2):
            for row in range(scores.shape[2]):
                for column in range(scores.shape[3]):
                    for anchor in range(3):
                        slot = (row * scores.shape[3] + column) * 3 + anchor
                        if weights[image, slot] == 0:
                            continue
                        count += 1
                        z_s, z_t = (each[image, anchor, row, column].item() for each in (scores, t_rpn[0][level]))
                        soft += divergence([z_s, 0.0], [z_t, 0.0], 1.7, 2.0)
                        if box_weights[image, slot, 0] > 0:
                            positives += 1
                            place = slice(4 * anchor, 4 * anchor + 4)
                            s, t = (each[image, place, row, column].tolist() for each in (deltas, t_rpn[1][level]))
                            box += bounded(s, t, targets[image, slot].tolist(), 10.0)
                            without += bounded(s, t, targets[image, slot].tolist())
    assert 0 < positives < count
    assert box > without > 0  # the margin counts
    assert found['loss_rpn_cls'].item() == pytest.approx(0.25 * soft / count, rel=1e-4)
    assert found['loss_rpn_bbox'].item() == pytest.approx(0.3 * box / count, rel=1e-4)

    logits, deltas, rois, labels, _, targets, _ = (each.detach() for each in seen['rcn'][:7])
    soft = box = without = positives = 0
    for roi in range(len(rois)):
        soft += divergence(logits[roi].tolist(), t_rcn['cls_score'][roi].tolist(), 1.7, 2.0)
        label = labels[roi].item()
        if label < 3:
            positives += 1
            place = slice(0, 4) if agnostic else slice(4 * label, 4 * label + 4)
            s, t = (each[roi, place].tolist() for each in (deltas, t_rcn['bbox_pred']))
            box += bounded(s, t, targets[roi].tolist(), 10.0)
            without += bounded(s, t, targets[roi].tolist())
    assert 0 < positives < len(rois)
    assert box > without > 0  # the margin counts
    assert found['loss_cls'].item() == pytest.approx(0.6 * soft / len(rois), rel=1e-4)
    assert found['loss_bbox'].item() == pytest.approx(0.7 * box / len(rois), rel=1e-4)

    own = model.extract_feat(batch['inputs'])
    adapters = model.distillers['it'].hint.adapters
    hint = sum((adapter(s) - t).square().mean() for adapter, s, t in zip(adapters, own, features, strict=True))
    torch.testing.assert_close(found['loss_hint'], 0.1 * hint, rtol=1e-4, atol=0)


@pytest.mark.parametrize('empty', [0, 1, 2])
def test_the_rpn_terms_have_the_divisor_of_the_students_own(empty, tmp_path, monkeypatch):
    """mmdet counts one positive anchor at least in each image, so one more for each image without."""
    model = pair(tmp_path)
    rpn_loss, seen = model.rpn_head.loss_by_feat_single, []

    def record(*args, **kwargs):
        seen.append((args, kwargs['avg_factor']))
        return rpn_loss(*args, **kwargs)

    monkeypatch.setattr(model.rpn_head, 'loss_by_feat_single', record)
    torch.manual_seed(0)
    batch = model.data_preprocessor(random_batch(model, (2, 3, 96, 128)), True)
    for sample in batch['data_samples'][:empty]:
        sample.gt_instances = sample.gt_instances[:0]
    found = model(**batch, mode='loss')
    with torch.no_grad():
        t_logits = model.sources['teacher'].model.rpn_head(
            [each.contiguous() for each in model.sources['teacher'].model.extract_feat(batch['inputs'])]
        )[0]
    total = sampled = 0
    for ((logits, _, _, _, weights, *_), _), target in zip(seen, t_logits, strict=True):
        pairs = [
            torch.nn.functional.pad(each.permute(0, 2, 3, 1).reshape(2, -1, 1), (0, 1)) for each in (logits, target)
        ]
        total += (chen.weighted_divergence(*pairs) * weights).sum()
        sampled += int((weights > 0).sum())
    (divisor,) = {factor for _, factor in seen}
    assert divisor == sampled + empty
    torch.testing.assert_close(found['it.loss_rpn_cls'], total / divisor)
    assert total > 0


def test_weights_are_relative_to_those_of_the_students_own_losses(tmp_path):
    """With mu there, and (1 - mu) / mu here, the sum is the paper's mu hard + (1 - mu) soft."""
    options = dict(rpn_cls_weight=1.5, cls_weight=1.5)
    plain, _ = losses(pair(tmp_path, **options))
    weighted = dict(loss_cls=dict(loss_weight=0.4), loss_bbox=dict(loss_weight=3.0))
    scaled, _ = losses(pair(tmp_path, **options, student=dict(rpn_head=weighted, roi_head=dict(bbox_head=weighted))))
    for key, factor in (('cls', 0.4), ('bbox', 3.0)):
        for name in (f'loss_rpn_{key}', f'loss_{key}'):
            torch.testing.assert_close(scaled[name], factor * plain[name])
            assert plain[name] > 0
    torch.testing.assert_close(scaled['loss_hint'], plain['loss_hint'])


def test_zero_for_equal_networks(tmp_path):
    """The student's own taps are the teacher's: a rounding error would decide which of two equal box errors is larger."""
    model = pair(tmp_path, same=True, adapter=None).eval()
    torch.manual_seed(0)
    batch = model.data_preprocessor(random_batch(model, (2, 3, 96, 128), 4), True)
    with Taps(model, model.distillers.student_layers) as taps:
        model.loss(batch['inputs'], batch['data_samples'])
    found = model.distillers['it'](taps, taps, batch['data_samples'])
    assert {key: value.item() for key, value in found.items()} == dict.fromkeys(found, 0)
    assert len(found) == 5


@pytest.mark.parametrize('objects', [0, 4])
def test_gradients_reach_student_and_adapters_and_never_the_teacher(objects, tmp_path):
    model = pair(tmp_path)
    found, _ = losses(model, objects)
    assert all(torch.isfinite(value) and value.requires_grad for value in found.values())
    for name in ('loss_rpn_bbox', 'loss_bbox'):
        assert (found[name] > 0) == bool(objects)
    assert found['loss_rpn_cls'] > 0
    assert found['loss_cls'] > 0
    sum(found.values()).backward()
    for head in (model.rpn_head, model.roi_head.bbox_head):
        assert all(each.grad is not None and torch.isfinite(each.grad).all() for each in head.parameters())
    assert model.rpn_head.rpn_cls.weight.grad.any()
    assert model.roi_head.bbox_head.fc_cls.weight.grad.any()
    assert model.rpn_head.rpn_reg.weight.grad.any() == bool(objects)
    assert model.roi_head.bbox_head.fc_reg.weight.grad.any() == bool(objects)
    parameters = list(model.distillers.parameters())
    assert len(parameters) == 10
    assert all(each.grad.any() for each in parameters)
    assert all(each.grad is None for each in model.sources['teacher'].model.parameters())


def test_no_roi_at_all_is_a_differentiable_zero(tmp_path):
    rcnn = dict(sampler=dict(num=0))
    found, _ = losses(pair(tmp_path, student=dict(train_cfg=dict(rcnn=rcnn))))
    sum(found.values()).backward()
    assert found['loss_cls'].item() == found['loss_bbox'].item() == 0


def test_a_pyramid_of_one_level(tmp_path):
    """The losses are called once then."""
    one = dict(
        neck=dict(start_level=3, num_outs=1),
        rpn_head=dict(anchor_generator=dict(strides=[32])),
        roi_head=dict(bbox_roi_extractor=dict(featmap_strides=[32])),
    )
    model = pair(tmp_path, student=one, teacher=one)
    assert len(losses(model)[0]) == 5


def test_the_hint_may_be_another_layer_than_rois_are_pooled_from(tmp_path):
    layers = dict(hint_layer='backbone.layer3', teacher_hint_layer='backbone.layer3')
    model = pair(tmp_path, **layers)
    (adapter,) = model.distillers['it'].hint.adapters
    assert adapter.conv.weight.shape == (32, 32, 1, 1)  # there for equal channels too
    assert losses(model)[0]['loss_hint'] > 0


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(teacher=dict(classes=5)), "'roi_head.bbox_head' differs in .classes.*Chen compares"),
        (dict(teacher=dict(rpn_head=dict(anchor_generator=dict(scales=[8])))), 'different anchors'),
        (dict(teacher=dict(rpn_head=dict(bbox_coder=dict(target_stds=[0.5] * 4)))), 'different units'),
        (dict(student=dict(rpn_head=dict(reg_decoded_bbox=True))), "'rpn_head' of the student has reg_decoded_bbox"),
        (dict(student=dict(roi_head=dict(bbox_head=dict(reg_decoded_bbox=True)))), "'roi_head.bbox_head' of the st"),
        (dict(student=dict(roi_head=dict(bbox_head=dict(loss_cls=dict(use_sigmoid=True))))), 'no softmax'),
        (dict(rpn_head='rpn'), "'rpn'.* has no such module"),
    ],
)
def test_pairs_that_cannot_be_compared_are_errors(options, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        pair(tmp_path, **options)


@pytest.mark.parametrize(
    'options',
    [
        dict(margin=-1),
        dict(bg_cls_weight=0),
        dict(tau=0.0),
        dict(tau='1'),
    ],
)
def test_options_out_of_range_are_errors(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        Chen(**options)
