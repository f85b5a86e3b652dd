import math

import pytest
import torch

from mmkd.distill import distill
from mmkd.distillers.generic import crd
from mmkd.distillers.generic.crd import CRD, contrast_loss, contrast_scores
from mmkd.errors import ConfigError
from mmkd.testing import models, segmentors
from mmkd.testing.batches import random_batch


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b)) / math.hypot(*a) / math.hypot(*b)


def loops(student, teacher, memory, there, partition, tau):
    entries = [m for m, full in zip(memory.tolist(), there.tolist()) if full]
    k = max(len(entries), 1)

    def h(a, b):
        value = math.exp(cosine(a, b) / tau) / partition
        return value / (value + k)

    total = 0.0
    for s, t in zip(student.tolist(), teacher.tolist()):
        total -= math.log(h(s, t)) + sum(math.log(1 - h(s, m)) for m in entries)
    return total / len(student)


@pytest.mark.parametrize('entries', [0, 3, 5])
def test_the_formula_as_plain_loops(entries):
    student, teacher, memory = (torch.randn(n, 6, dtype=torch.float64) for n in (4, 4, 5))
    there = torch.arange(5) < entries
    scores = contrast_scores(student, teacher, memory, 0.5)
    found = contrast_loss(*scores, there, torch.tensor(2.0, dtype=torch.float64).log())
    assert found.item() == pytest.approx(loops(student, teacher, memory, there, 2.0, 0.5), rel=1e-6)


def test_large_scores_stay_finite():
    each = [torch.randn(n, 6, requires_grad=True) for n in (4, 4, 5)]
    loss = contrast_loss(*contrast_scores(*each, 1e-3), torch.ones(5, dtype=torch.bool), torch.tensor(1000.0))
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(part.grad).all() for part in each)


def test_less_alike_others_and_more_alike_pairs_are_better():
    positive, negative = torch.zeros(1, requires_grad=True), torch.zeros(1, 3, requires_grad=True)
    there = torch.tensor([True, True, False])
    contrast_loss(positive, negative, there, torch.tensor(0.0)).backward()
    assert positive.grad.item() < 0
    assert (negative.grad[0] > 0).tolist() == there.tolist()


def trained(tmp_path, **options):
    config = segmentors.pspnet(24)
    checkpoint = models.save_weights(config, tmp_path / 'teacher.pth')
    entry = dict(type='CRD', layer='decode_head.bottleneck', channels=8, memory=40, samples=18) | options
    model = distill(
        models.build(segmentors.pspnet(), seed=0), dict(config=config, checkpoint=checkpoint), dict(crd=entry)
    )
    model.sources['teacher'].load()
    return model.train()


def test_the_queue_has_the_teachers_cells_of_earlier_steps_and_z_stays(tmp_path):
    model = trained(tmp_path)
    method, (memory,) = model.distillers.crd, model.distillers.crd.memories
    batch = model.data_preprocessor(random_batch(model, (2, 3, 64, 128)), True)
    level = model.sources['teacher'](batch['inputs'], batch['data_samples'])['decode_head.bottleneck'][0]
    cells = torch.nn.functional.interpolate(level, (24, 48), mode='nearest')  # of 3 x 3: each 8 x 16
    cells = torch.nn.functional.avg_pool2d(cells, (8, 16)).flatten(2).transpose(1, 2).flatten(0, 1)
    assert level.shape[2:] == (8, 16)
    model(**batch, mode='loss')
    assert memory.filled.sum() == 18
    torch.testing.assert_close(memory.keys[:18], cells)
    assert not method.known.any()
    model(**batch, mode='loss')
    first = method.log_partitions.clone()
    assert method.known.all()
    assert memory.filled.sum() == 36
    batch['inputs'] = -batch['inputs']
    model(**batch, mode='loss')
    assert memory.filled.all()
    torch.testing.assert_close(method.log_partitions, first, rtol=0, atol=0)


def test_the_checkpoint_has_queue_and_z(tmp_path):
    model = trained(tmp_path)
    batch = model.data_preprocessor(random_batch(model, (2, 3, 64, 128)), True)
    for _ in range(2):
        model(**batch, mode='loss')
    state = model.state_dict()
    assert {key for key in state if 'memories' in key or 'partition' in key or 'known' in key} == {
        *(f'distillers.crd.memories.0.{part}' for part in ('keys', 'filled', 'cursor')),
        'distillers.crd.log_partitions',
        'distillers.crd.known',
    }
    other = trained(tmp_path)
    other.load_state_dict(state)
    found = []
    for each in (model, other):
        torch.manual_seed(0)
        found.append(each(**batch, mode='loss')['crd.loss'])
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_z_is_looked_for_until_it_is_known_and_by_one_reduction_of_all_levels(tmp_path, monkeypatch):
    """And again after a checkpoint from before it was known; not at all after one that has it."""
    reduced = []
    monkeypatch.setattr(crd, 'all_reduce', lambda value, op: reduced.append(len(value)))
    layers = ['backbone.layer4', 'decode_head.bottleneck']
    model = trained(tmp_path, layer=layers)
    batch = model.data_preprocessor(random_batch(model, (2, 3, 64, 128)), True)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for state, expected in ((None, [2, 2]), (before, [2, 2]), (model.state_dict(), [])):
        reduced.clear()
        if state is not None:
            model.load_state_dict(state)
        for _ in range(4):
            model(**batch, mode='loss')
        assert reduced == expected
        assert model.distillers.crd.known.all()


@pytest.mark.parametrize(
    'options', [dict(tau=0), dict(tau='0.07'), dict(memory=0), dict(memory=63), dict(channels=1.5), dict(samples=0)]
)
def test_options_out_of_range_are_errors(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        CRD('neck', **options)
