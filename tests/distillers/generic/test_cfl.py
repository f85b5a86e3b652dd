import math

import pytest
import torch
import torch.nn.functional as F

import mmkd
from mmkd.distillers.generic.cfl import WIDTHS, gaussians
from mmkd.distillers.generic.nst import squared_mmd
from mmkd.errors import ConfigError
from mmkd.testing import detectors, models
from mmkd.testing.batches import random_batch

KEYS = ('it.loss_mmd', 'it.loss_reconstruction')


def test_the_kernel_as_plain_loops():
    first, second = (F.normalize(torch.randn(n, 3, dtype=torch.float64), dim=1) for n in (4, 6))
    found = gaussians(first, second)
    for i, x in enumerate(first.tolist()):
        for j, y in enumerate(second.tolist()):
            squared = sum((a - b) ** 2 for a, b in zip(x, y))
            expected = sum(math.exp(-squared / (2 * width**2)) for width in WIDTHS)
            assert found[i, j].item() == pytest.approx(expected, rel=1e-9)


def test_the_gradient_of_the_kernel_is_that_of_finite_differences():
    first, second = (F.normalize(torch.randn(n, 3, dtype=torch.float64), dim=1).requires_grad_() for n in (4, 6))
    assert torch.autograd.gradcheck(lambda x, y: gaussians(x, y, (0.2, 1.0, 2.0)), (first, second))


def test_the_discrepancy_is_that_of_distributions():
    torch.manual_seed(0)
    x, y, z = (F.normalize(torch.randn(400, 4) + shift, dim=1) for shift in (0.0, 0.0, 1.0))
    assert squared_mmd(x, x[torch.randperm(400)], gaussians).item() == pytest.approx(0, abs=1e-5)
    near, far = squared_mmd(x, y, gaussians), squared_mmd(x, z, gaussians)
    assert 0 < near < far / 5


def build(names='ab', **options):
    teachers = {}
    for name in names:
        config = dict(a=detectors.retinanet(24, classes=2), b=detectors.faster_rcnn(20, classes=4))[name]
        teachers[name] = dict(config=models.build(config, seed=ord(name)).eval())
    entry = dict(type='CFL', layer='neck', teacher=list(names), **options)
    torch.manual_seed(0)
    model = mmkd.distill(models.build(detectors.retinanet(), seed=0), teachers, dict(it=entry))
    for source in model.sources.values():
        source.load()
    return model.train()


def found(model, seed=0):
    data = model.data_preprocessor(random_batch(model, (2, 3, 64, 96)), True)
    torch.manual_seed(seed)
    losses = model(**data, mode='loss')
    return [losses[key] for key in KEYS]


def test_every_part_learns_and_no_teacher():
    """Teachers of other families, widths and classes; of the second only the levels that the student has as well."""
    model = build()
    shapes = {name: len(each.pairs) for name, each in model.distillers['it'].levels.items()}
    assert shapes == dict(a=3, b=3)
    assert len(model.distillers['it'].own) == 3
    assert model.distillers['it'].shared.first.in_features == 4
    losses = found(model)
    assert all(torch.isfinite(each) and each > 0 for each in losses)
    sum(losses).backward()
    for name, each in model.distillers.named_parameters():
        assert each.grad is not None, name
        assert torch.isfinite(each.grad).all(), name
    assert model.backbone.conv1.weight.grad.abs().sum() > 0
    for source in model.sources.values():
        assert all(each.grad is None for each in source.model.parameters())


def test_the_space_does_not_shrink_to_a_point():
    """Only the student's map is moved by what pulls it to the teachers; theirs by what they have to give back as well."""
    model = build()
    mmd, reconstruction = found(model)
    others = list(model.distillers['it'].others.parameters())
    own = list(model.distillers['it'].own.parameters())
    assert all(each is None for each in torch.autograd.grad(reconstruction, own, allow_unused=True, retain_graph=True))
    assert all(each.abs().sum() > 0 for each in torch.autograd.grad(reconstruction, others))
    assert all(each.abs().sum() > 0 for each in torch.autograd.grad(mmd, own)[::2])


def test_positions_are_drawn_and_are_those_of_both():
    model = build(positions=8)
    method = model.distillers['it']
    first = torch.arange(2 * 3 * 48.0).view(2, 3, 6, 8)
    torch.manual_seed(1)
    s, t = method._drawn(first, first + 0.5)
    assert s.shape == (16, 3)
    assert torch.equal(t, s + 0.5)
    assert len(s[:8, 0].unique()) == 8
    assert torch.equal(s[8:, 0], s[:8, 0] + 3 * 48)
    assert torch.equal(found(model, 5)[0], found(model, 5)[0])
    assert not torch.equal(found(model, 5)[0], found(model, 6)[0])


def test_one_teacher_will_do():
    assert all(each > 0 for each in found(build('a')))


def test_layers_by_teacher():
    levels = build(teacher_layer=dict(a='neck', b='neck')).distillers['it'].levels
    assert [each.teacher_layers for each in levels.values()] == [('neck',), ('neck',)]


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(positions=0), 'positions=0: expected a whole number of at least 1'),
        (dict(common_channels=0), 'common_channels=0: expected a whole number of at least 1'),
        (dict(match='size'), "match='size': expected 'stride' or 'index'"),
        (dict(teacher_layer=dict(a='neck')), "teacher_layer=.*: names none of teacher 'b'"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ConfigError, match=message) as error:
        build(**options)
    assert '\n' not in str(error.value)
