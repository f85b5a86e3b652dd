import math

import pytest
import torch
from mmdet.structures import DetDataSample

from mmkd.distill import distill
from mmkd.distillers.detection import quantization_mimic as qm
from mmkd.distillers.detection.mimic import Mimic, half_mean_square
from mmkd.distillers.detection.quantization_mimic import QuantizationMimic
from mmkd.errors import ConfigError
from mmkd.hosts.running import probe
from mmkd.taps import Taps
from mmkd.testing import detectors, models
from mmkd.testing.batches import random_batch


def nearest_entry(value, step, signed):
    """The rule of the paper, by search through the dictionary."""
    entries = [code * step for code in range(-100 if signed else 0, 101)]
    for below, entry, above in zip([-math.inf, *entries], entries, [*entries[1:], math.inf]):
        if (below + entry) / 2 < value <= (entry + above) / 2:
            return entry
    raise AssertionError(value)


@pytest.mark.parametrize('signed', [True, False])
def test_the_nearest_entry_by_search(signed):
    values = torch.cat([4 * torch.randn(500, dtype=torch.float64), torch.arange(-20, 21, dtype=torch.float64) / 8])
    found = qm.quantize(values, 0.25, signed)
    assert found.tolist() == [nearest_entry(value, 0.25, signed) for value in values.tolist()]


def test_halves_go_down_and_entries_stay():
    values = torch.tensor([-0.75, -0.5, -0.25, 0.0, 0.25, 0.2500001, 0.5, 0.75, 1.0])
    assert qm.quantize(values, 0.5).tolist() == [-1.0, -0.5, -0.5, 0.0, 0.0, 0.5, 0.5, 0.5, 1.0]
    random = torch.randn(1000)
    once = qm.quantize(random, 0.3)
    assert torch.equal(qm.quantize(once, 0.3), once)
    assert (once - random).abs().max() <= 0.15 + 1e-6


@pytest.mark.parametrize('signed', [True, False])
def test_the_gradient_passes_straight_through_on_both_sides(signed):
    student = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    q_s, q_t = (qm.quantize(each, 0.5, signed) for each in (student, teacher))
    half_mean_square(q_s, q_t).backward()
    torch.testing.assert_close(student.grad, (q_s - q_t).detach() / 20)
    torch.testing.assert_close(teacher.grad, (q_t - q_s).detach() / 20)
    assert student.grad.abs().sum() > 0


def test_the_loss_as_plain_loops():
    student, teacher = torch.randn(2, 6, 4, 3, 3, dtype=torch.float64)
    largest = max(abs(value) for value in teacher.flatten().tolist())
    total = 0.0
    for region_s, region_t in zip(student, teacher):
        codes = [[math.ceil(f * 8 / largest - 0.5) for f in each.flatten().tolist()] for each in (region_s, region_t)]
        total += sum((largest / 8 * (b - a)) ** 2 for a, b in zip(*codes)) / len(codes[0])
    loss = QuantizationMimic(quantization_levels=8).compare(student, teacher)
    assert loss.item() == pytest.approx(total / 12, rel=1e-6)


@pytest.mark.parametrize('options', [dict(step=0.3, signed=False), dict(quantization_levels=5)])
def test_the_shell_quantizes_both_sides_and_weighs(options):
    """The student's features after its adapter, and the teacher's; what the heads say is compared as it is."""
    student = models.build(detectors.faster_rcnn(), seed=0)
    teacher = models.build(detectors.faster_rcnn(channels=24), seed=1).eval()
    distiller = QuantizationMimic(**options, feature_weight=2.0, cls_weight=3.0, bbox_weight=5.0)
    distiller.prepare(student, teacher)
    distiller.setup(probe(student, distiller.student_layers), probe(teacher, distiller.teacher_layers))
    images, rois = torch.randn(1, 3, 96, 128), torch.tensor([[0.0, 10, 20, 60, 70], [0, 5, 5, 100, 90]])
    with Taps(student, distiller.student_layers) as s, Taps(teacher, distiller.teacher_layers) as t:
        own, other = (model.roi_head._bbox_forward(model.extract_feat(images), rois) for model in (student, teacher))
    found = distiller(s, t, [DetDataSample(metainfo=dict(img_shape=(96, 128)))])
    features, targets = distiller.adapters[0](own['bbox_feats']), other['bbox_feats']
    step = options.get('step', targets.abs().max() / 5)
    codes = [(each / step - 0.5).ceil() for each in (features, targets)]
    if not options.get('signed', True):
        codes = [each.clamp(min=0) for each in codes]
    torch.testing.assert_close(found['loss_feature'], 2 * 0.5 * (step * (codes[0] - codes[1])).square().mean())
    torch.testing.assert_close(found['loss_cls'], 3 * (own['cls_score'] - other['cls_score']).square().mean())
    torch.testing.assert_close(found['loss_bbox'], 5 * (own['bbox_pred'] - other['bbox_pred']).square().mean())
    assert min(found.values()) > 0


def test_no_loss_within_the_same_entry_though_features_differ():
    teacher = torch.arange(10.0).view(1, 10)
    student = teacher + 0.4 * (2 * torch.rand(1, 10) - 1)
    assert QuantizationMimic(step=1.0).compare(student, teacher).item() == 0
    assert QuantizationMimic(step=0.1).compare(student, teacher).item() > 0


def test_a_small_step_is_mimic():
    student, teacher = torch.randn(2, 6, 4, 7, 7, dtype=torch.float64)
    expected = Mimic().compare(student, teacher).item()
    errors = [abs(QuantizationMimic(step=s).compare(student, teacher).item() / expected - 1) for s in (1e-2, 1e-6)]
    assert errors[1] < 1e-6 < errors[0]


@pytest.mark.parametrize('step', [None, 0.5])
def test_no_region_and_teachers_without_range(step):
    distiller = QuantizationMimic(step=step)
    for shape in ((0, 4, 7, 7), (3, 4, 7, 7)):
        student = torch.randn(shape, requires_grad=True)
        loss = distiller.compare(student, torch.zeros(shape))
        loss.backward()
        assert torch.isfinite(loss)
        assert (loss == 0) == (shape[0] == 0)
        assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize('family', ['faster_rcnn', 'retinanet'])
@pytest.mark.parametrize('objects', [4, 0])
def test_student_and_adapter_learn_and_the_teacher_does_not(family, objects, tmp_path):
    teacher = getattr(detectors, family)(24)
    options = dict(config=teacher, checkpoint=models.save_weights(teacher, tmp_path / 'teacher.pth'))
    spec = dict(type='QuantizationMimic', head=None if family == 'faster_rcnn' else 'bbox_head')
    model = distill(models.build(getattr(detectors, family)(), seed=0), options, dict(q=spec))
    model.sources['teacher'].load()
    losses = model.train()(**model.data_preprocessor(random_batch(model, (2, 3, 96, 128), objects), True), mode='loss')
    losses['q.loss_feature'].backward()
    assert losses['q.loss_feature'].item() > 0
    assert len(list(model.distillers.parameters())) == 2
    assert all(each.grad.abs().sum() > 0 for each in model.distillers.parameters())
    assert model.backbone.layer2[0].conv1.weight.grad.abs().sum() > 0
    assert all(each.grad is None for each in model.sources['teacher'].model.parameters())


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(step=0.0), 'step=0.0: expected a positive'),
        (dict(step=True), 'step=True'),
        (dict(step=float('nan')), 'step=nan'),
        (dict(quantization_levels=0), 'quantization_levels=0: expected a whole'),
        (dict(quantization_levels=2.5), 'quantization_levels=2.5'),
        (dict(proposal='teacher'), "no option 'proposal'; the nearest are 'proposals'"),
        (dict(proposals='both'), "proposals='both'"),
    ],
)
def test_options_out_of_range_are_errors(options, message):
    with pytest.raises(ConfigError, match=message):
        QuantizationMimic(**options)
