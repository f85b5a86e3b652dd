import math

import pytest
import torch
import torch.nn.functional as F

from mmkd.distill import distill
from mmkd.distillers.generic.dkd import DKD, decoupled_divergence
from mmkd.errors import ConfigError
from mmkd.taps import Taps
from mmkd.testing import detectors, models, segmentors
from mmkd.testing.batches import random_batch
from mmkd.testing.closed_form import closed_form_inputs


def softmax(values):
    powers = [math.exp(value - max(values)) for value in values]
    return [power / sum(powers) for power in powers]


def divergence(teacher, student):
    return sum(p * math.log(p / q) for p, q in zip(teacher, student))


def loops(student, teacher, labels, tau):
    target = others = number = 0
    for s, t, y in zip(student.tolist(), teacher.tolist(), labels.tolist()):
        if y < 0:
            continue
        (p, p_hat), (q, q_hat) = (
            (softmax(z)[y], softmax(z[:y] + z[y + 1 :])) for z in ([x / tau for x in row] for row in (t, s))
        )
        target += divergence([p, 1 - p], [q, 1 - q])
        others += divergence(p_hat, q_hat)
        number += 1
    return tau**2 * target / number, tau**2 * others / number


LABELS = torch.tensor([0, 2, 5, 3])


@pytest.mark.parametrize('tau', [1.0, 4.0])
@pytest.mark.parametrize('labels', [LABELS, torch.tensor([0, -1, 5, -1])])
def test_the_formula_as_plain_loops(tau, labels):
    student, teacher = (each.double() for each in closed_form_inputs((4, 6)))
    found = decoupled_divergence(student, teacher, labels, tau)
    assert [each.item() for each in found] == pytest.approx(loops(student, teacher, labels, tau), rel=1e-10)


def test_both_parts_make_up_the_divergence_of_all_classes():
    """KL = TCKD + (1 - p) NCKD, of a single position: KD's value, see Zhao et al."""
    student, teacher = closed_form_inputs((4, 6))
    total = 0.0
    for s, t, y in zip(student.double(), teacher.double(), LABELS):
        tckd, nckd = decoupled_divergence(s[None], t[None], y[None])
        total += (tckd + (1 - t.softmax(0)[y]) * nckd).item() / 4
    assert total == pytest.approx(1.5143452, rel=1e-5)  # mdistiller's KD of these inputs


def test_maps_are_positions():
    student, teacher = closed_form_inputs((2, 5, 4, 6))
    labels = torch.arange(48).view(2, 4, 6) % 6 - 1
    flat = [each.permute(0, 2, 3, 1).flatten(0, 2) for each in (student, teacher)]
    torch.testing.assert_close(
        decoupled_divergence(student, teacher, labels), decoupled_divergence(*flat, labels.flatten())
    )


def test_networks_that_are_sure_of_themselves_are_finite():
    student = torch.tensor([[300.0, 0.0, -300.0], [0.0, 300.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[-300.0, 0.0, 300.0], [300.0, 0.0, 0.0]])
    found = decoupled_divergence(student, teacher, torch.tensor([0, 0]))
    sum(found).backward()
    assert all(torch.isfinite(each) for each in found)
    assert torch.isfinite(student.grad).all()


def test_zero_for_equal_logits_for_other_places_of_zero_and_without_labels():
    student = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    for teacher, labels in ((student, LABELS), (student + 3, LABELS), (torch.randn(4, 6), -torch.ones_like(LABELS))):
        found = decoupled_divergence(student, teacher, labels)
        sum(found).backward()
        assert [each.item() for each in found] == pytest.approx([0, 0], abs=1e-12)
    assert torch.isfinite(student.grad).all()


def test_a_position_without_a_label_may_hold_anything():
    student, teacher = torch.randn(2, 4, 6)
    labels = torch.tensor([0, -1, 5, -1])
    expected = decoupled_divergence(student[::2], teacher[::2], labels[::2])
    for logits in (student, teacher):
        logits[1], logits[3] = -95.0, torch.nan  # exp(95) is infinite
    student.requires_grad_()
    found = decoupled_divergence(student, teacher, labels)
    torch.testing.assert_close(found, expected)
    sum(found).backward()
    assert torch.isfinite(student.grad).all()
    assert not student.grad[1::2].any()


def test_the_gradient_reaches_the_student_alone():
    student, teacher = (torch.randn(4, 6, requires_grad=True) for _ in range(2))
    sum(decoupled_divergence(student, teacher, LABELS)).backward()
    assert student.grad.any()
    assert teacher.grad is None


def test_of_two_classes_nothing_is_left_beside_the_target():
    found = decoupled_divergence(torch.randn(4, 2), torch.randn(4, 2), torch.tensor([0, 1, 1, 0]))
    assert found[1] == 0


def pair(tmp_path, student, teacher, **options):
    checkpoint = models.save_weights(teacher, tmp_path / 'teacher.pth')
    entry = dict(type='DKD', **options)
    model = distill(models.build(student, seed=0), dict(config=teacher, checkpoint=checkpoint), dict(dkd=entry))
    model.sources['teacher'].load()
    return model.train()


def test_a_segmentors_pixels_by_their_labels(tmp_path):
    model = pair(tmp_path, segmentors.pspnet(), segmentors.pspnet(24), tckd_weight=2.0, nckd_weight=3.0, tau=2.0)
    batch = model.data_preprocessor(random_batch(model, (2, 3, 64, 128), 2), True)
    layer = 'decode_head.conv_seg'
    with Taps(model, [layer]) as student:
        model.loss(batch['inputs'], batch['data_samples'])
    teacher = model.sources['teacher'](batch['inputs'], batch['data_samples'])
    found = model.distillers.dkd(student, teacher, batch['data_samples'])
    labels = torch.stack([sample.gt_sem_seg.data[0, 4::8, 4::8] for sample in batch['data_samples']])
    labels = labels.masked_fill(labels == 255, -1)
    assert 0 < (labels < 0).sum() < labels.numel()
    tckd, nckd = decoupled_divergence(student[layer][0], teacher[layer][0], labels, 2.0)
    torch.testing.assert_close(found, {'loss_tckd': 2 * tckd, 'loss_nckd': 3 * nckd})


def test_a_roi_heads_regions_by_the_labels_that_it_is_trained_with(tmp_path, monkeypatch):
    model = pair(tmp_path, detectors.faster_rcnn(), detectors.faster_rcnn(24))
    batch = model.data_preprocessor(random_batch(model, (2, 3, 96, 128)), True)
    seen, trained = [], []
    monkeypatch.setattr(
        'mmkd.distillers.generic.dkd.decoupled_divergence',
        lambda *given: seen.append(given) or decoupled_divergence(*given),
    )
    head = model.roi_head.bbox_head
    head.loss_cls.register_forward_hook(lambda _, inputs, output: trained.append(inputs))
    model(**batch, mode='loss')
    ((student, teacher, labels, _),) = seen
    torch.testing.assert_close(student, trained[0][0])
    torch.testing.assert_close(labels, trained[0][1])
    assert (labels == head.num_classes).any()
    assert (labels < head.num_classes).any()
    assert teacher.shape == student.shape
    assert not F.mse_loss(student, teacher) == 0


@pytest.mark.parametrize('make', [detectors.retinanet, detectors.fcos, detectors.gfl])
def test_sigmoid_heads_are_an_error(make, tmp_path):
    with pytest.raises(ConfigError, match=r"head 'bbox_head' .* sigmoid scores: .*; use KD"):
        pair(tmp_path, make(), make())


@pytest.mark.parametrize(
    ('layer', 'message'),
    [
        ('roi_heads', r"layer 'roi_heads': FasterRCNN has no such module; the nearest are 'roi_head'"),
        ('roi_head.bbox_head', r'how to read this head is not known'),
        ('rpn_head', r"'rpn_head' .* sigmoid scores"),
    ],
)
def test_a_layer_that_is_no_roi_head_is_an_error(layer, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        pair(tmp_path, detectors.faster_rcnn(), detectors.faster_rcnn(), layer=layer)


@pytest.mark.parametrize('options', [dict(tau=0), dict(tau='1'), dict(tckd_weight=-1), dict(nckd_weight='1')])
def test_options_out_of_range_are_errors(options):
    with pytest.raises(ConfigError, match=next(iter(options)).partition('_')[0]):
        DKD(**options)
