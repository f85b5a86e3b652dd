import math

import pytest
import torch

from mmkd.distill import distill
from mmkd.distillers.generic.crcd import CRCD, relation_scores
from mmkd.distillers.generic.crd import contrast_loss
from mmkd.errors import ConfigError
from mmkd.testing import models, segmentors
from mmkd.testing.batches import random_batch


def unit(row):
    length = math.hypot(*row)
    return [value / length for value in row]


def relation(embedding, anchor):
    return unit([a - b for a, b in zip(unit(embedding), unit(anchor))])


def loops(student, teacher, memory, there, partition, tau):
    entries = [m for m, full in zip(memory.tolist(), there.tolist()) if full]
    k = max(len(entries), 1)

    def h(a, b):
        value = math.exp(sum(x * y for x, y in zip(a, b)) / tau) / partition
        return value / (value + k)

    total, pairs = 0.0, 0
    for a, anchor in enumerate(teacher.tolist()):
        for i, (s, t) in enumerate(zip(student.tolist(), teacher.tolist())):
            if i == a:
                continue
            own = relation(s, anchor)
            total -= math.log(h(own, relation(t, anchor)))
            total -= sum(math.log(1 - h(own, relation(m, anchor))) for m in entries)
            pairs += 1
    return total / pairs


@pytest.mark.parametrize('entries', [0, 3, 5])
def test_the_formula_as_plain_loops(entries):
    student, teacher, memory = (torch.randn(n, 6, dtype=torch.float64) for n in (4, 4, 5))
    there = torch.arange(5) < entries
    scores = relation_scores(student, teacher, memory, 0.5)
    assert [each.shape for each in scores] == [(12,), (12, 5)]
    found = contrast_loss(*scores, there, torch.tensor(2.0, dtype=torch.float64).log())
    assert found.item() == pytest.approx(loops(student, teacher, memory, there, 2.0, 0.5), rel=1e-6)


def test_a_student_with_the_teachers_relations_is_as_like_as_can_be():
    teacher, memory = torch.randn(5, 6), torch.randn(8, 6)
    positive, negative = relation_scores(3 * teacher, teacher, memory, 0.05)
    torch.testing.assert_close(positive, torch.full((20,), 20.0))
    assert (negative < 20).all()
    other, _ = relation_scores(teacher.roll(1, 0), teacher, memory, 0.05)
    assert (other < 19).all()


def test_equal_cells_have_no_direction_and_no_large_gradient():
    teacher = torch.randn(1, 6).repeat(4, 1).requires_grad_()
    student, memory = torch.randn(4, 6, requires_grad=True), teacher.detach()[:2]
    positive, negative = relation_scores(student, teacher, memory, 0.05)
    assert not positive.any()
    assert not negative.any()
    contrast_loss(positive, negative, torch.ones(2, dtype=torch.bool), torch.tensor(0.0)).backward()
    for each in (student, teacher):
        assert each.grad.abs().max() < 1e6


def test_a_single_cell_has_no_relation_and_no_loss():
    each = [torch.randn(n, 6, requires_grad=True) for n in (1, 1, 5)]
    loss = contrast_loss(*relation_scores(*each), torch.ones(5, dtype=torch.bool), torch.tensor(0.0))
    loss.backward()
    assert loss == 0
    assert all(not part.grad.any() for part in each)


def trained(tmp_path):
    config = segmentors.pspnet(24)
    checkpoint = models.save_weights(config, tmp_path / 'teacher.pth')
    entry = dict(type='CRCD', layer='decode_head.bottleneck', channels=8, tau=0.5, memory=40, samples=18)
    model = distill(
        models.build(segmentors.pspnet(), seed=0), dict(config=config, checkpoint=checkpoint), dict(crcd=entry)
    )
    model.sources['teacher'].load()
    return model.train()


def test_a_step_is_told_from_the_cells_of_the_step_before(tmp_path):
    model = trained(tmp_path)
    method, seen = model.distillers.crcd, []
    rows = method.rows
    method.rows = lambda *taps: seen.append(rows(*taps)) or seen[-1]
    batch = model.data_preprocessor(random_batch(model, (2, 3, 64, 128)), True)
    model(**batch, mode='loss')
    batch['inputs'] = -batch['inputs']
    loss = model(**batch, mode='loss')['crcd.loss']
    ((_, before),), ((s, t),) = seen
    (own,), (project,) = method.projections, method.teacher_projections
    there, partition = torch.ones(len(before), dtype=torch.bool), method.log_partitions[0].exp().item()
    with torch.no_grad():
        each = (each.double() for each in (own(s), project(t), project(before)))
        assert loss.item() == pytest.approx(loops(*each, there, partition, 0.5), rel=1e-4)


def test_the_gradient_reaches_the_student_and_both_projections(tmp_path):
    model = trained(tmp_path)
    batch = model.data_preprocessor(random_batch(model, (2, 3, 64, 128)), True)
    model(**batch, mode='loss')
    model(**batch, mode='loss')['crcd.loss'].backward()
    method = model.distillers.crcd
    for part in (model.backbone.stem[0], *method.projections, *method.teacher_projections):
        assert part.weight.grad.any()
    assert all(parameter.grad is None for parameter in model.sources['teacher'].model.parameters())


@pytest.mark.parametrize(
    'options', [dict(tau=0), dict(memory=0), dict(channels=1.5), dict(samples=0), dict(samples=3), dict(samples='64')]
)
def test_options_out_of_range_are_errors(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        CRCD('neck', **options)
