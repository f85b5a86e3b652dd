import math
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from mmkd.distill import distill
from mmkd.distillers.segmentation.rmrkd import RMRKD, mutual_relation_loss
from mmkd.errors import ConfigError
from mmkd.taps import Taps
from mmkd.testing import detectors, models, segmentors
from mmkd.testing.batches import random_batch


def random_masks(batch=2, classes=4, height=4, width=5):
    """(B, H, W) labels and (B, K, H, W): the last class is ignored, and in no mask."""
    labels = torch.randint(0, classes, (batch, height, width)).masked_fill(torch.rand(batch, height, width) < 0.2, 255)
    labels = labels.masked_fill(labels == classes - 1, 255)
    return labels, torch.stack([labels == k for k in range(classes)], 1)


def divergence(teacher, student):
    def softmax(values):
        powers = [math.exp(value - max(values)) for value in values]
        return [power / sum(powers) for power in powers]

    return sum(p * math.log(p / q) for p, q in zip(softmax(teacher), softmax(student)))


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def plain_loops(student, teacher, labels, classes, tau):
    total = 0.0
    for s_image, t_image, image in zip(student, teacher, labels):
        s, t, label = s_image.flatten(1).t().tolist(), t_image.flatten(1).t().tolist(), image.flatten().tolist()
        for k in range(classes):
            inside = [a for a, each in enumerate(label) if each == k]
            outside = [a for a, each in enumerate(label) if each not in (k, 255)]
            if not inside:
                continue
            for feature in (s, t):
                centre = [sum(feature[a][c] for a in inside) / len(inside) for c in range(len(s[0]))]
                for region in (inside, outside):
                    rows = ([cosine(centre, each[a]) / tau for a in region] for each in (t, s))
                    total += divergence(*rows) if region else 0.0
    return tau**2 * total / (4 * len(labels))


@pytest.mark.parametrize('tau', [0.1, 1.0, 4.0])
def test_the_formula_as_plain_loops(tau):
    student, teacher = torch.randn(2, 2, 6, 4, 5, dtype=torch.float64)
    labels, masks = random_masks()
    found = mutual_relation_loss(student, teacher, masks, tau)
    assert found.item() == pytest.approx(plain_loops(student, teacher, labels, 4, tau), rel=1e-6)


@pytest.mark.parametrize('seed', range(3))
def test_the_authors_sum_over_columns_is_the_width_times_this(seed):
    """Their softmax is over one axis, with zeros outside a region, and the divergences of all columns are summed: 64 columns
    make about 64 times the loss, for blocks of 8x8 of a class, which is where the default weight comes from."""
    torch.manual_seed(seed)
    labels = torch.randint(0, 6, (2, 8, 8)).repeat_interleave(8, 1).repeat_interleave(8, 2)
    student, teacher = torch.randn(2, 2, 32, 64, 64).relu()
    student, teacher = (each + 0.5 * torch.randn(6, 32)[labels].movedim(3, 1) for each in (student, teacher))
    masks = torch.stack([labels == k for k in range(19)], 1)

    def theirs():
        total = 0.0
        for k in range(6):
            for region in (labels == k, labels != k):
                s, t = student * region[:, None], teacher * region[:, None]
                for centre in (student, teacher):
                    own = (centre * (labels == k)[:, None]).sum((2, 3))[:, :, None, None]
                    s_log, t_log = ((torch.cosine_similarity(own, each) / 0.1).log_softmax(1) for each in (s, t))
                    total += 0.01 * (t_log.exp() * (t_log - s_log)).sum() / 2
        return total / 4

    assert (theirs() / mutual_relation_loss(student, teacher, masks)).item() == pytest.approx(64, rel=0.1)


def test_zero_for_equal_and_for_rotated_and_scaled_features():
    student = torch.randn(2, 6, 4, 5, dtype=torch.float64)
    _, masks = random_masks()
    assert mutual_relation_loss(student, student, masks).item() == pytest.approx(0, abs=1e-12)
    assert mutual_relation_loss(student, 3 * student, masks).item() == pytest.approx(0, abs=1e-12)
    other = student.flip(1)
    assert mutual_relation_loss(student, other, masks) > 1e-3  # the other network's centres are in its own space


def test_ignored_positions_do_not_matter():
    student, teacher = torch.randn(2, 2, 6, 4, 5)
    _, masks = random_masks()
    expected = mutual_relation_loss(student, teacher, masks)
    noise = 50 * ~masks.any(1, keepdim=True) * torch.randn(2, 6, 4, 5)
    torch.testing.assert_close(mutual_relation_loss(student + noise, teacher - noise, masks), expected)


@pytest.mark.parametrize('case', ['nothing', 'one class', 'one position', 'zeros'])
def test_degenerate_regions_are_finite_and_differentiable(case):
    student, teacher = torch.randn(2, 2, 6, 4, 5)
    masks = torch.zeros(2, 4, 4, 5, dtype=torch.bool)
    if case in ('one class', 'zeros'):
        masks[:, 1] = True
    elif case == 'one position':
        masks[:, 1, 2, 2] = True
    student = (0 * student if case == 'zeros' else student).requires_grad_()
    loss = mutual_relation_loss(student, teacher, masks)
    loss.backward()
    assert torch.isfinite(student.grad).all()
    assert bool(student.grad.any()) == (case in ('one class', 'zeros'))
    assert (loss.item() == 0) == (case not in ('one class', 'zeros'))


def test_a_batch_of_one_weighs_as_much_as_a_larger_one():
    student, teacher = torch.randn(2, 1, 6, 4, 5)
    _, masks = random_masks(1)
    three = [each.repeat(3, 1, 1, 1) for each in (student, teacher, masks)]
    torch.testing.assert_close(mutual_relation_loss(*three), mutual_relation_loss(student, teacher, masks))


def test_the_gradient_reaches_the_student_alone_and_its_centres_but_not_through_targets():
    student = torch.randn(1, 4, 3, 4, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(1, 4, 3, 4, dtype=torch.float64, requires_grad=True)
    _, masks = random_masks(1, 3, 3, 4)
    mutual_relation_loss(student, teacher, masks, 1.0).backward()
    assert student.grad.any()
    assert teacher.grad is None
    found, student.grad = student.grad, None
    # the target of the student's centre is a constant: with it, the loss would fall where that moves as well
    centres = torch.einsum('bkhw,bchw->bkc', masks.double(), student)
    own, constant = (
        torch.cosine_similarity(c[..., None, None], f[:, None], 2)
        for c, f in ((centres, student), (centres, teacher.detach()))
    )
    other = torch.einsum('bkhw,bchw->bkc', masks.double(), teacher.detach())
    crossed, target = (
        torch.cosine_similarity(other[..., None, None], f[:, None], 2) for f in (student, teacher.detach())
    )
    loss = 0.0
    for k in range(3):
        inside = masks[0, k]
        for region in (inside, masks[0].any(0) & ~inside):
            for s, t in ((own, constant.detach()), (crossed, target)):
                if inside.any() and region.any():
                    s, t = (each[0, k][region].log_softmax(0) for each in (s, t))
                    loss = loss + (t.exp() * (t - s)).sum() / 4
    loss.backward()
    torch.testing.assert_close(student.grad, found)


def pair(tmp_path, family='pspnet', teacher=None, **options):
    config = teacher or getattr(segmentors, family)(24, base=16)
    checkpoint = models.save_weights(config, tmp_path / 'teacher.pth')
    student = models.build(getattr(segmentors, family)(), seed=0)
    options = dict(layer='backbone.layer4') | options
    model = distill(student, dict(config=config, checkpoint=checkpoint), dict(rmrkd=dict(type='RMRKD', **options)))
    model.sources['teacher'].load()
    return model.train()


@pytest.mark.parametrize(
    ('family', 'options'),
    [
        ('pspnet', {}),
        ('pspnet', dict(layer=['backbone.layer3', 'backbone.layer4'])),
        ('segformer', dict(layer='backbone')),
    ],
)
def test_a_training_step(family, options, tmp_path):
    """Without a label it is a differentiable zero, which adapters take part in."""
    model = pair(tmp_path, family, **options)
    for objects in (4, 0):
        data = model.data_preprocessor(random_batch(model, (2, 3, 64, 96), objects), True)
        model.zero_grad()
        loss = model(**data, mode='loss')['rmrkd.loss']
        assert (loss > 0) == (objects > 0)
        loss.backward()
        adapters = list(model.distillers.parameters())
        assert adapters
        for parameter in (*adapters, next(model.backbone.parameters())):
            assert torch.isfinite(parameter.grad).all()
        assert model.distillers.rmrkd.levels.adapters[0].conv.weight.grad.any() == (objects > 0)


def test_labels_of_a_batch_and_weight(tmp_path):
    model = pair(tmp_path, 'deeplabv3', segmentors.pspnet(24), loss_weight=3.0, tau=1.0)
    data = model.data_preprocessor(random_batch(model, (2, 3, 64, 96), objects=2), True)
    with Taps(model, ['backbone.layer4']) as student:
        loss = model(**data, mode='loss')['rmrkd.loss']
    (s,), (t,) = student['backbone.layer4'], model.sources['teacher'](data['inputs'], None)['backbone.layer4']
    labels = torch.cat([sample.gt_sem_seg.data for sample in data['data_samples']])[:, 4::8, 4::8]
    masks = torch.stack([labels == k for k in range(19)], 1)
    s = torch.nn.functional.interpolate(s, t.shape[2:], mode='bilinear')
    expected = plain_loops(s.double().detach(), t.double(), labels, 19, 1.0)
    assert masks.any()
    assert loss.item() == pytest.approx(3 * expected, rel=1e-4)


@pytest.mark.parametrize('options', [dict(tau=0), dict(tau='1'), dict(loss_weight='2'), dict(match='size')])
def test_options_out_of_range_are_errors(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        RMRKD('backbone.layer4', **options)


def test_a_detector_is_an_error():
    student, teacher = (models.build(detectors.retinanet(), seed=0) for _ in range(2))
    with pytest.raises(ConfigError, match='RetinaNet is no segmentor, and RMRKD takes the class of each pixel'):
        distill(student, teacher, dict(it=dict(type='RMRKD', layer='neck')))


@pytest.mark.parametrize(
    ('name', 'layers', 'authors'),
    [
        ('rmrkd_pspnet', ['backbone.layer4'], 0.1),
        ('rmrkd_deeplabv3_mbv2', ['backbone.layer5', 'backbone.layer3'], 1.0),
    ],
)
def test_configs_have_the_authors_stages_and_their_weight_for_the_width_of_the_map(name, layers, authors):
    config = Config.fromfile(Path(__file__).resolve().parents[3] / 'configs' / f'{name}.py')
    spec = config.model.distillers.rmrkd
    assert [spec.layer, *filter(None, [spec.get('teacher_layer')])] == layers
    assert spec.loss_weight == authors * config.crop_size[1] / 8
