import math

import pytest
import torch
import torch.nn.functional as F

from mmkd.distill import distill
from mmkd.distillers.segmentation.dist import DIST, correlation, relation_losses
from mmkd.errors import ConfigError
from mmkd.hosts.running import probe
from mmkd.taps import Taps
from mmkd.testing import models, segmentors
from mmkd.testing.batches import random_batch
from mmkd.testing.closed_form import closed_form_inputs


def softmax(values, tau):
    powers = [math.exp(value / tau) for value in values]
    return [power / sum(powers) for power in powers]


def pearson(a, b):
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    a, b = [v - mean_a for v in a], [v - mean_b for v in b]
    dot, aa, bb = (sum(v * w for v, w in zip(*each)) for each in ((a, b), (a, a), (b, b)))
    return dot / (math.sqrt(aa) * math.sqrt(bb) + 1e-8)


def plain_loops(student, teacher, tau, valid):
    """Both terms, pixel by pixel and class by class, in float64."""
    batch, classes, height, width = student.shape
    places = [(b, y, x) for b in range(batch) for y in range(height) for x in range(width)]
    places = [place for place in places if valid is None or valid[place]]
    s, t = ([softmax(each[b, :, y, x].tolist(), tau) for b, y, x in places] for each in (student, teacher))
    inter = sum(1 - pearson(p, q) for p, q in zip(s, t)) / len(places)
    intra = sum(1 - pearson([p[k] for p in s], [q[k] for q in t]) for k in range(classes)) / classes
    return inter, intra


def test_the_value_of_a_public_implementation():
    """The term within classes of MMRazor's, given (pixels, classes)."""
    _, intra = relation_losses(*closed_form_inputs((2, 5, 4, 6)))
    assert intra.item() == pytest.approx(0.97606, abs=5e-6)


@pytest.mark.parametrize('tau', [0.5, 1.0, 4.0])
@pytest.mark.parametrize('masked', [False, True])
def test_the_formula_as_plain_loops(tau, masked):
    student, teacher = 2 * torch.randn(2, 2, 5, 3, 4, dtype=torch.float64)
    valid = torch.rand(2, 3, 4) < 0.5 if masked else None
    found = [each.item() for each in relation_losses(student, teacher, tau, valid)]
    assert found == pytest.approx(plain_loops(student, teacher, tau, valid), rel=1e-6)


def test_left_out_pixels_change_nothing_and_get_no_gradient():
    student, teacher = torch.randn(2, 5, 4, 6, requires_grad=True), torch.randn(2, 5, 4, 6)
    valid = torch.rand(2, 4, 6) < 0.5
    expected = relation_losses(student, teacher, valid=valid)
    other = [torch.where(valid[:, None], each, 9 * torch.randn(2, 5, 4, 6)) for each in (student, teacher)]
    torch.testing.assert_close(relation_losses(*other, valid=valid), expected)
    sum(expected).backward()
    assert (student.grad.abs().sum(1) > 0).equal(valid)


@pytest.mark.parametrize('pixels', [0, 1])
def test_nothing_valid_is_a_differentiable_zero_and_one_pixel_has_no_relation_within_classes(pixels):
    student, teacher = torch.randn(2, 5, 4, 6, requires_grad=True), torch.randn(2, 5, 4, 6)
    valid = torch.zeros(2, 4, 6, dtype=torch.bool)
    valid[0, 0, :pixels] = True
    inter, intra = relation_losses(student, teacher, valid=valid)
    (inter + intra).backward()
    of_pixel = [softmax(each[0, :, 0, 0].tolist(), 1.0) for each in (student, teacher)]
    assert inter.item() == pytest.approx(pixels * (1 - pearson(*of_pixel)), rel=1e-5)
    assert intra.item() == pytest.approx(0, abs=1e-6)
    assert torch.isfinite(student.grad).all()
    assert student.grad.any() == (pixels > 0)


def test_zero_for_equal_inputs_and_whatever_is_added_to_a_pixel():
    student = torch.randn(2, 5, 4, 6)
    for other in (student, student + 5 * torch.randn(2, 1, 4, 6)):
        for loss in relation_losses(student, other):
            assert loss.item() == pytest.approx(0, abs=1e-6)


def test_correlation_is_linear_and_of_minus_one_to_one():
    a, noise = torch.randn(2, 7, 50, dtype=torch.float64)
    a, noise = a - a.mean(1, keepdim=True), noise - noise.mean(1, keepdim=True)
    ones = torch.ones(7, dtype=torch.float64)
    torch.testing.assert_close(correlation(a, 3 * a, 1), ones)
    torch.testing.assert_close(correlation(a, -3 * a, 1), -ones)
    torch.testing.assert_close(
        correlation(a, noise, 1), torch.stack([torch.corrcoef(p)[0, 1] for p in zip_rows(a, noise)])
    )


def zip_rows(a, b):
    return [torch.stack(pair) for pair in zip(a, b)]


@pytest.mark.parametrize('constant', ['student', 'teacher', 'both'])
def test_constant_probabilities_are_finite_and_differentiable(constant):
    """A class that one of the networks sees nowhere, or equally everywhere, correlates with nothing."""
    student, teacher = torch.randn(2, 2, 5, 4, 6, dtype=torch.float64)
    student = torch.zeros_like(student) if constant != 'teacher' else student
    teacher = torch.ones_like(teacher) if constant != 'student' else teacher
    student.requires_grad_()
    inter, intra = relation_losses(student, teacher)
    (inter + intra).backward()
    assert torch.isfinite(student.grad).all()
    for loss in (inter, intra):
        assert loss.item() == pytest.approx(1, abs=1e-5)


def test_a_class_of_probability_zero_has_a_finite_gradient():
    student, teacher = torch.randn(2, 2, 5, 4, 6)
    student[:, 0] = -1000
    teacher[:, 1] = -1000
    student.requires_grad_()
    sum(relation_losses(student, teacher)).backward()
    assert torch.isfinite(student.grad).all()
    assert student.grad.any()


def authors(student, teacher):
    """The sum of both terms as the authors' code has it, where all pixels count."""
    rows = [each.softmax(1).transpose(0, 1).flatten(1).t() for each in (student, teacher)]

    def one_less_cosine(a, b):
        a, b = (each - each.mean(1, keepdim=True) for each in (a, b))
        dot, aa, bb = ((v * w).sum(1) for v, w in ((a, b), (a, a), (b, b)))
        return 1 - (dot / (aa.sqrt() * bb.sqrt() + 1e-8)).mean()

    return one_less_cosine(*rows) + one_less_cosine(*(each.t() for each in rows))


@pytest.mark.parametrize('absent', [(0, 0), (10, 10), (14, 14), (17, 17), (17, 0), (0, 17), (40, 40), (40, 0)])
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
def test_classes_that_are_nowhere_as_the_authors_code_has_them(absent, dtype):
    """Two of five classes, of a probability of 1 in e^absent: the value and the direction and length of the gradient."""
    student, teacher = torch.randn(2, 2, 5, 16, 16, dtype=torch.float64)
    for each, less in zip((student, teacher), absent):
        each[:, :2] -= less
    results = []
    for function, precision in ((authors, torch.float64), (lambda s, t: sum(relation_losses(s, t)), dtype)):
        s = student.clone().to(precision).requires_grad_()
        loss = function(s, teacher.to(precision))
        loss.backward()
        results.append((loss.item(), s.grad.double().flatten()))
    (expected, steep), (found, slope) = results
    exact = dtype is torch.float64
    assert found == pytest.approx(expected, rel=1e-12 if exact else 1e-5)
    assert F.cosine_similarity(slope, steep, dim=0).item() == pytest.approx(1, abs=1e-12 if exact else 1e-6)
    assert (slope.norm() / steep.norm()).item() == pytest.approx(1, abs=1e-9 if exact else 1e-4)


def test_a_batch_of_one_weighs_as_much_as_a_larger_one():
    student, teacher = torch.randn(2, 1, 5, 4, 6)
    three = [each.repeat(3, 1, 1, 1) for each in (student, teacher)]
    torch.testing.assert_close(relation_losses(*three), relation_losses(student, teacher))


def test_channels_last_inputs_and_extreme_logits():
    student, teacher = torch.randn(2, 2, 5, 4, 6)
    last = [each.contiguous(memory_format=torch.channels_last) for each in (student, teacher)]
    torch.testing.assert_close(relation_losses(*last), relation_losses(student, teacher))
    student[0, 0, 0, 0] += 200
    teacher[0, 1, 0, 0] += 200
    student.requires_grad_()
    loss = sum(relation_losses(student, teacher))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()


def test_the_gradient_reaches_the_student_and_not_the_teacher():
    student, teacher = (torch.randn(2, 5, 4, 6, requires_grad=True) for _ in range(2))
    for term in range(2):
        student.grad = None
        relation_losses(student, teacher)[term].backward()
        assert student.grad.any()
    assert teacher.grad is None


# --- as a distiller


def pair(tmp_path, teacher, **distillers):
    checkpoint = models.save_weights(teacher, tmp_path / 'teacher.pth')
    model = distill(models.build(segmentors.pspnet(), seed=0), dict(config=teacher, checkpoint=checkpoint), distillers)
    model.sources['teacher'].load()
    return model.train()


@pytest.mark.parametrize('teacher', [segmentors.pspnet(24, base=16), segmentors.deeplabv3(24)], ids=['psp', 'aspp'])
def test_terms_are_weighed_and_ignored_pixels_left_out(teacher, tmp_path):
    model = pair(tmp_path, teacher, dist=dict(type='DIST', inter_weight=6.0, intra_weight=1.5, tau=2.0))
    data = model.data_preprocessor(random_batch(model, (2, 3, 64, 96), objects=1), True)
    taps = model.sources['teacher'](data['inputs'], data['data_samples'])
    with Taps(model, model.distillers.student_layers) as student:
        model.decode_head.forward(model.extract_feat(data['inputs']))
    (s,), (t,) = student['decode_head.conv_seg'], taps['decode_head.conv_seg']
    stride = 64 // t.shape[2]
    labels = torch.cat([sample.gt_sem_seg.data for sample in data['data_samples']])
    labels = labels[:, stride // 2 :: stride, stride // 2 :: stride]
    s = F.interpolate(s, t.shape[2:], mode='bilinear')
    expected = plain_loops(s.double(), t.double(), 2.0, labels != 255)
    found = model.distillers.dist(student, taps, data['data_samples'])
    assert set(found) == {'loss_inter', 'loss_intra'}
    assert found['loss_inter'].item() == pytest.approx(6 * expected[0], rel=1e-4)
    assert found['loss_intra'].item() == pytest.approx(1.5 * expected[1], rel=1e-4)
    model.distillers.dist.use_labels = False
    every = model.distillers.dist(student, taps, None)
    torch.testing.assert_close(every['loss_inter'], 6 * relation_losses(s, t, 2.0)[0])
    assert abs(every['loss_inter'] - found['loss_inter']) > 1e-4


def test_a_training_step_with_auxiliary_logits(tmp_path):
    layer = 'auxiliary_head.conv_seg'
    methods = dict(dist=dict(type='DIST'), auxiliary=dict(type='DIST', layer=layer, inter_weight=0.4, intra_weight=0.4))
    model = pair(tmp_path, segmentors.pspnet(24), **methods)
    for objects in (4, 0):
        data = model.data_preprocessor(random_batch(model, (2, 3, 64, 96), objects), True)
        losses = {key: value for key, value in model(**data, mode='loss').items() if key.partition('.')[0] in methods}
        assert len(losses) == 4
        for loss in losses.values():
            assert torch.isfinite(loss)
            assert (loss > 1e-3) == (objects > 0)
        sum(losses.values()).backward()
        assert all(each.grad is None for each in model.sources['teacher'].model.parameters())
        for head in (model.decode_head, model.auxiliary_head):
            assert head.conv_seg.weight.grad.any() == (objects > 0)
            head.conv_seg.weight.grad = None


def test_a_student_may_learn_from_another_head_of_the_teacher(tmp_path):
    layers = dict(layer='auxiliary_head.conv_seg', teacher_layer='decode_head.conv_seg')
    model = pair(tmp_path, segmentors.pspnet(24), dist=dict(type='DIST', **layers))
    data = model.data_preprocessor(random_batch(model, (2, 3, 64, 96), 4), True)
    losses = model(**data, mode='loss')
    (losses['dist.loss_inter'] + losses['dist.loss_intra']).backward()
    assert model.auxiliary_head.conv_seg.weight.grad.any()
    assert model.decode_head.conv_seg.weight.grad is None


def test_layers_that_cannot_be_compared_are_an_error():
    student, teacher = (models.build(segmentors.pspnet(classes=number)) for number in (19, 7))
    distiller = DIST()
    distiller.prepare(student, teacher)
    with pytest.raises(ConfigError, match='19 channels'):
        distiller.setup(*(probe(model, distiller.student_layers) for model in (student, teacher)))


@pytest.mark.parametrize('options', [dict(tau=0), dict(tau='1'), dict(inter_weight='1'), dict(intra_weight='2')])
def test_options_out_of_range_are_errors(options):
    name = next(iter(options))
    with pytest.raises(ConfigError, match='weight' if 'weight' in name else name):
        DIST(**options)
