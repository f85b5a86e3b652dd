import math

import pytest
import torch
from mmcv.ops import batched_nms

import mmkd
from mmkd.distillers.detection import erd
from mmkd.errors import ConfigError
from mmkd.hosts.detection.boxes import pairwise_iou
from mmkd.testing import detectors, models
from mmkd.testing.batches import random_batch
from mmkd.testing.properties import losses

OLD = {0: 1, 3: 0, 4: 2}  # of a student of five classes those that its teacher knows


@pytest.mark.parametrize('alpha', [2.0, 0.5, -0.5])
def test_what_stands_out_as_plain_loops(alpha):
    confidence = torch.rand(3, 60, dtype=torch.float64) ** 4
    inside = torch.rand(3, 60) > 0.2
    found = erd.outstanding(confidence, inside, alpha)
    for values, there, selected in zip(confidence.tolist(), inside.tolist(), found.tolist()):
        known = [value for value, here in zip(values, there) if here]
        mean = sum(known) / len(known)
        std = math.sqrt(sum((value - mean) ** 2 for value in known) / (len(known) - 1))
        assert selected == [here and value > mean + alpha * std for value, here in zip(values, there)]
        assert 0 < sum(selected) < len(known)


@pytest.mark.parametrize('slots', [0, 1, 9])
def test_of_equal_confidences_none_stands_out(slots):
    """Nor where an image has no slot, or one."""
    inside = torch.arange(9) < slots
    found = erd.outstanding(torch.full((1, 9), 0.25), inside[None])
    assert not found.any()


def random_boxes(*shape, sides=(5, 30), size=60.0):
    first = torch.rand(*shape, 2) * size
    return torch.cat([first, first + sides[0] + torch.rand(*shape, 2) * sides[1]], -1)


@pytest.mark.parametrize('iou', [0.005, 0.3])
def test_what_is_apart_is_what_nms_leaves(iou):
    torch.manual_seed(0)
    boxes, labels = random_boxes(2, 400), torch.randint(0, 3, (2, 400))
    scores = torch.rand(2, 400).sort(descending=True).values
    valid = torch.rand(2, 400) > 0.3
    found = erd.apart(boxes, labels, valid, iou)
    for image in range(2):
        there = torch.nonzero(valid[image]).flatten()
        of_image = (each[image][there].contiguous() for each in (boxes, scores, labels))
        _, kept = batched_nms(*of_image, dict(iou_threshold=iou))
        assert torch.equal(torch.nonzero(found[image]).flatten(), there[kept].sort().values)


def test_a_chain_that_is_too_long_leaves_out_what_is_not_known():
    """Each box overlaps the one before alone: every other one stays, as far as the rounds reach."""
    left = torch.arange(200.0) * 8
    boxes = torch.stack([left, left * 0, left + 10, left * 0 + 10], 1)[None]
    found = erd.apart(boxes, torch.zeros(1, 200), torch.ones(1, 200, dtype=torch.bool), 0.005)[0]
    assert found[: 2 * erd.ROUNDS].tolist() == [True, False] * erd.ROUNDS
    assert not found[2 * erd.ROUNDS :].any()


def test_class_responses_as_plain_loops():
    student, teacher = torch.randn(2, 3, 7, 4, dtype=torch.float64)
    selected = torch.rand(3, 7) > 0.5
    selected[1] = False
    total = 0.0
    for image in range(3):
        slots = [slot for slot in range(7) if selected[image, slot]]
        squares = [
            (student[image, slot, c].item() - teacher[image, slot, c].item()) ** 2 for slot in slots for c in range(4)
        ]
        total += sum(squares) / max(len(squares), 1)
    assert erd.class_response_loss(student, teacher, selected).item() == pytest.approx(total / 3, rel=1e-12)


def test_box_responses_as_plain_loops():
    divergence, score = torch.rand(3, 7, 4, dtype=torch.float64), torch.rand(3, 7, dtype=torch.float64)
    selected = torch.rand(3, 7) > 0.5
    total = sum(
        divergence[b, i, e].item() * score[b, i].item()
        for b in range(3)
        for i in range(7)
        for e in range(4)
        if selected[b, i]
    )
    assert erd.box_response_loss(divergence, score, selected).item() == pytest.approx(total / 12, rel=1e-12)


def distilled(student=None, teacher=None, classes=OLD, **options):
    student = models.build(student or detectors.gfl(classes=5), seed=0)
    teacher = dict(config=models.build(teacher or detectors.gfl(classes=3), seed=1))
    if classes:
        teacher['classes'] = classes
    model = mmkd.distill(student, teacher, dict(it=dict(type='ERD', **options)))
    model.init_weights()
    return model


def batch_of(model, objects=4, size=(96, 128)):
    return model.data_preprocessor(random_batch(model, (2, 3, *size), objects), True)


def test_it_learns_from_the_old_classes_alone():
    """The rows of new classes get no gradient, those of the old ones do, whatever their order in both networks."""
    model = distilled(alpha=0.5)
    found = losses(model, batch_of(model))
    assert found.keys() == {'it.loss_cls', 'it.loss_bbox'}
    sum(found.values()).backward()
    rows = model.bbox_head.gfl_cls.weight.grad.abs().flatten(1).sum(1)
    assert (rows > 0).tolist() == [True, False, False, True, True]
    assert model.bbox_head.gfl_reg.weight.grad.abs().sum() > 0
    assert model.backbone.conv1.weight.grad.abs().sum() > 0


def test_a_student_that_starts_from_the_old_model_has_nothing_to_learn_at_first():
    student, teacher = models.build(detectors.gfl(classes=5), seed=0), models.build(detectors.gfl(classes=3), seed=1)
    parts = ['backbone', 'neck', 'bbox_head']
    model = mmkd.distill(
        student, dict(config=teacher, classes=OLD), dict(it=dict(type='ERD', alpha=0.5)), inherit=parts
    )
    model.init_weights()
    for module in model.modules():  # teachers are in eval mode
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()
    found = losses(model, batch_of(model))
    assert all(value.item() == pytest.approx(0, abs=1e-8) for value in found.values())
    with torch.no_grad():
        model.bbox_head.gfl_cls.bias[1] += 3  # of a new class
    assert losses(model, batch_of(model)) == found
    with torch.no_grad():
        model.bbox_head.gfl_cls.bias[3] += 3
    assert losses(model, batch_of(model))['it.loss_cls'].item() == pytest.approx(2 * 9 / 3, rel=1e-4)


def test_nothing_that_stands_out_is_a_differentiable_zero():
    model = distilled(alpha=1e6)
    found = model(**batch_of(model), mode='loss')
    assert found['it.classes'].item() == found['it.boxes'].item() == 0
    own = [found['it.loss_cls'], found['it.loss_bbox']]
    assert [each.item() for each in own] == [0, 0]
    sum(own).backward()
    assert torch.isfinite(model.bbox_head.gfl_cls.weight.grad).all()
    assert model.backbone.conv1.weight.grad.abs().sum() == 0


def test_selected_boxes_are_apart_and_shown():
    model = distilled(alpha=0.5, nms_iou=0.2)
    batch = batch_of(model)
    with torch.no_grad(), mmkd.taps.Taps(model, ['bbox_head']) as student:
        model.bbox_head(model.extract_feat(batch['inputs']))
    teacher = model.sources['teacher'](batch['inputs'], batch['data_samples'])
    teacher.classes = model.sources['teacher'].classes
    distiller = model.distillers['it']
    (boxes, valid) = distiller.pictures(student, teacher, batch['data_samples'])['old boxes that are learnt']
    assert valid.any()
    _, old = distiller._logits(student, teacher)
    metas = [sample.metainfo for sample in batch['data_samples']]
    _, selected, of_slots = distiller.select(student, teacher, old, metas)
    assert torch.equal(valid.sum(1), selected.sum(1).clamp(max=100))
    for image in range(2):
        shown, labels = of_slots[image][selected[image]], old[image].argmax(1)[selected[image]]
        overlap = pairwise_iou(shown, shown).fill_diagonal_(0)
        assert overlap[labels[:, None] == labels].max() <= 0.2
        assert torch.equal(shown.sort(0).values, boxes[image][valid[image]].sort(0).values)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(student=detectors.retinanet(classes=5)), r'RetinaHead \(student\) does not predict distributions'),
        (dict(teacher=detectors.gfl(bbox_head=dict(reg_max=8))), r'reg_max 16 \(student\) and 8 \(teacher\)'),
        (dict(classes=None), r'predict 5 \(student\) and 3 \(teacher\) classes, and ERD compares'),
        (dict(classes={0: 3}), 'teacher class 3; it has 3, 0 to 2'),
        (dict(alpha='2'), "alpha='2': expected a "),
        (dict(tau=0.0), 'tau=0.0: expected a positive temperature'),
        (dict(nms_iou=2.0), 'nms_iou=2.0: expected a number from 0 to 1'),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ConfigError, match=message) as error:
        distilled(**options)
    assert '\n' not in str(error.value)
