import itertools
import math

import pytest
import torch

import mmkd
from mmkd.distillers.generic.matching_guided import Matching, MatchingGuided, assign, likeness, reduce_channels
from mmkd.distillers.generic.ofd import partial_loss
from mmkd.errors import ConfigError
from mmkd.taps import Taps
from mmkd.testing import models, segmentors
from mmkd.testing.batches import random_batch


def test_likeness_as_plain_loops():
    torch.manual_seed(0)
    student, teacher = (torch.randn(2, c, 3, 4, dtype=torch.float64) for c in (2, 5))
    found = likeness(student, teacher)
    for i, j in itertools.product(range(2), range(5)):
        expected = 0.0
        for b in range(2):
            s, t = student[b, i].flatten().tolist(), teacher[b, j].flatten().tolist()
            expected += sum(x * y for x, y in zip(s, t)) / math.sqrt(sum(x * x for x in s) * sum(y * y for y in t))
        assert found[i, j].item() == pytest.approx(expected, rel=1e-12)


def test_a_channel_of_zeros_is_like_no_other():
    assert not likeness(torch.zeros(1, 1, 2, 2), torch.ones(1, 3, 2, 2)).any()


def test_the_assignment_is_the_best_of_all():
    """Two channels of the student, five of the teacher: of each two, without the worst; all are tried."""
    torch.manual_seed(0)
    alike = torch.randn(2, 5, dtype=torch.float64)
    found = assign(alike)
    assert found.shape == (2, 2)
    assert len(set(found.flatten().tolist())) == 4
    value = sum(alike[c, d].item() for row in found.tolist() for c, d in enumerate(row))
    best = max(
        sum(alike[index % 2, d].item() for index, d in enumerate(order))
        for order in itertools.permutations(range(5), 4)
    )
    assert value == pytest.approx(best)


def test_a_permutation_of_channels_is_found():
    feature, order = torch.randn(2, 6, 4, 4), torch.randperm(6)
    assert torch.equal(feature[:, order][:, assign(likeness(feature, feature[:, order]))[0]], feature)


@pytest.mark.parametrize(('how', 'expected'), [('absmax', [-4.0, 2.0]), ('max', [1.0, 2.0]), ('mean', [-1.5, 0.5])])
def test_reductions(how, expected):
    teacher = torch.tensor([9.0, 1.0, -1.0, -4.0, 2.0]).reshape(1, 5, 1, 1)
    found = reduce_channels(teacher, torch.tensor([[1, 4], [3, 2]]), how)
    assert found.flatten().tolist() == expected


def test_when_channels_are_assigned():
    """In the first step, by that; then by the first two of each four."""
    torch.manual_seed(0)
    matching = Matching(3, 9, interval=4, track=2)
    batches = [(torch.randn(1, 3, 3, 3), torch.randn(1, 9, 3, 3)) for _ in range(8)]
    alike = [likeness(*each) for each in batches]
    found = [matching(*each).clone() for each in batches]
    expected = {0: alike[0], 1: alike[0] + alike[1], 5: alike[4] + alike[5]}
    for step in range(8):
        assert torch.equal(found[step], assign(expected[max(each for each in expected if each <= step)]))
    assert not torch.equal(found[0], found[5])
    matching.eval()
    assert torch.equal(matching(*batches[0]), found[7])
    assert matching.steps == 8


def test_it_goes_on_from_a_checkpoint():
    torch.manual_seed(0)
    batches = [(torch.randn(1, 3, 3, 3), torch.randn(1, 9, 3, 3)) for _ in range(8)]
    one, other = (Matching(3, 9, interval=4, track=2) for _ in range(2))
    found = [one(*each).clone() for each in batches[:5]]
    other.load_state_dict(one.state_dict())
    assert [torch.equal(one(*each), other(*each)) for each in batches[5:]] == [True] * 3
    assert not torch.equal(one.assignment, found[4])


def test_values_that_are_not_finite_are_left_out():
    matching = Matching(2, 4, interval=4, track=2)
    matching(torch.full((1, 2, 3, 3), math.nan), torch.randn(1, 4, 3, 3))
    assert torch.isfinite(matching.alike).all()


def model_of(tmp_path, base=16, **options):
    torch.manual_seed(0)
    teacher = segmentors.pspnet(base=base)
    checkpoint = models.save_weights(teacher, tmp_path / 'teacher.pth')
    student = models.build(segmentors.pspnet(base=8), seed=0)
    spec = dict(type='MatchingGuided', layer=['backbone.layer3', 'backbone.layer4'], **options)
    model = mmkd.distill(student, dict(config=teacher, checkpoint=checkpoint), dict(it=spec))
    model.init_weights()
    return model.train()


def test_the_loss_is_ofds_of_the_matched_channels(tmp_path):
    model = model_of(tmp_path, loss_weight=2.0, reduction='mean')
    data = model.data_preprocessor(random_batch(model, (2, 3, 64, 64)), True)
    found = model(**data, mode='loss')['it.loss']
    own, layers = model.distillers['it'], model.distillers.student_layers
    assert layers == ('backbone.layer3.1.relu:last_input', 'backbone.layer4.1.relu:last_input')
    teacher = model.sources['teacher'](data['inputs'], data['data_samples'])
    with Taps(model, layers) as student:
        model.extract_feat(data['inputs'])
    expected = 0.0
    for k, layer in enumerate(layers):
        (s,), (t,) = student[layer], teacher[layer]
        assignment = assign(likeness(s.detach(), t))
        assert assignment.shape[0] == t.shape[1] // s.shape[1] > 1
        bound = t.clamp(max=0).sum((0, 2, 3)) / (t < 0).sum((0, 2, 3)).clamp(min=1)
        part = partial_loss(own.norms[k](s), t[:, assignment].mean(1), bound[assignment].mean(0))
        expected += 2 * part.item() / (2, 1)[k]
    assert found.item() == pytest.approx(expected, rel=1e-4)


def test_nothing_of_it_is_exported(tmp_path):
    model = model_of(tmp_path)
    assert [key for key in model.state_dict() if 'assignment' in key]
    assert not [key for key in model.plain().state_dict() if 'distillers' in key]


def test_a_narrower_teacher_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r'32 channels, and the teacher has 16.*OFD'):
        model_of(tmp_path, base=4)


@pytest.mark.parametrize(
    'options',
    [
        dict(reduction='median'),
        dict(interval=0),
        dict(track=1.5),
        dict(track=6000),
        dict(teacher_layer=3),
        dict(layer=None),
    ],
)
def test_options_out_of_range_are_errors(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        MatchingGuided(**{'layer': 'neck', **options})
