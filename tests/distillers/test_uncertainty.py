"""The teacher's features with their uncertainty, an option of all methods that compare levels."""

import pytest
import torch
import torch.nn.functional as F

import mmkd
from mmkd.distillers.uncertainty import Uncertainty, uncertain
from mmkd.errors import ConfigError
from mmkd.testing import detectors, models, segmentors
from mmkd.testing.batches import random_batch
from mmkd.testing.properties import assert_differentiable, losses

UNCERTAIN = dict(passes=3, p=0.25)
METHODS = dict(
    FGD=dict(),
    MGD=dict(layer='neck'),
    PKD=dict(layer='neck'),
    CWD=dict(layer='neck'),
    AT=dict(layer='neck'),
    FRS=dict(feature_weight=0.005, cls_weight=0.02),
    FGFI=dict(head='bbox_head', loss_weight=0.01),
)


def plain_loops(values, masks, p):
    found = []
    for index, value in enumerate(values):
        total = value
        for mask in masks:
            total += value / (1 - p) if mask[index] else 0.0
        found.append(total / (len(masks) + 1))
    return found


def test_the_formula_as_plain_loops():
    feature = torch.randn(40, dtype=torch.float64)
    torch.manual_seed(3)
    masks = [(F.dropout(torch.ones_like(feature), 0.3) > 0).tolist() for _ in range(4)]
    torch.manual_seed(3)
    assert uncertain(feature, 4, 0.3).tolist() == pytest.approx(plain_loops(feature.tolist(), masks, 0.3), rel=1e-12)


@pytest.mark.parametrize(('passes', 'p'), [(1, 0.5), (5, 0.1), (8, 0.4)])
def test_mean_and_variance_are_those_that_are_said(passes, p):
    found = uncertain(torch.full((400_000,), 3.0), passes, p)
    assert found.mean().item() == pytest.approx(3.0, abs=0.02)
    assert found.var().item() == pytest.approx(9 * passes / (passes + 1) ** 2 * p / (1 - p), rel=0.02)


def test_the_fewest_and_the_most_that_one_pass_leaves():
    assert set(uncertain(torch.full((100,), 2.0), 1, 0.5).tolist()) == {1.0, 3.0}  # 2 / 2, and (2 + 4) / 2


def test_it_is_drawn_anew_and_only_in_training():
    feature, drawn = torch.rand(2, 3, 8, 8), Uncertainty()
    assert not torch.equal(drawn(feature), drawn(feature))
    assert drawn.eval()(feature) is feature


def distilled(options, config=None, **more):
    config = detectors.retinanet() if config is None else config
    student, teacher = models.build(config, seed=0), models.build(config, seed=1)
    model = mmkd.distill(student, teacher, dict(it=dict(**options, **more)))
    model.init_weights()
    return model


def batch_of(model):
    return model.data_preprocessor(random_batch(model, (2, 3, 64, 64)), True)


@pytest.mark.parametrize('method', METHODS)
def test_every_method_that_compares_levels_has_it(method):
    options = dict(type=method, **METHODS[method])
    plain, model = distilled(options), distilled(options, uncertainty=UNCERTAIN)
    assert model.state_dict().keys() == plain.state_dict().keys()
    model.load_state_dict(plain.state_dict())
    batch = batch_of(model)
    found, other = losses(model, batch), losses(plain, batch)
    assert any(not torch.equal(found[key], other[key]) for key in other)
    again = losses(model, batch)
    assert all(torch.equal(found[key], again[key]) for key in found)  # with the same random numbers
    assert_differentiable(model, found)
    plain.eval(), model.eval().load_state_dict(plain.state_dict())
    found, other = losses(model, batch), losses(plain, batch)
    assert all(torch.equal(found[key], other[key]) for key in other)


def test_what_is_compared_is_the_mean_of_the_dropouts():
    model = distilled(dict(type='PKD', layer='neck'), uncertainty=UNCERTAIN)
    seen = []
    model.distillers['it'].compare = lambda student, teacher: seen.append(teacher) or student.mean()
    batch = batch_of(model)
    model(**batch, mode='loss')
    teacher = model.sources['teacher'].model
    with torch.no_grad():
        plain = teacher.extract_feat(batch['inputs'])
    for found, feature in zip(seen, plain, strict=True):
        counts = 4 * found / feature.where(feature != 0, 1.0)  # 1 + number kept / 0.75
        kept = ((counts - 1) * 0.75).where(feature.abs() > 1e-4, 0.0)
        assert (kept - kept.round()).abs().max() < 1e-2
        assert set(kept.round().unique().tolist()) == {0.0, 1.0, 2.0, 3.0}


def test_of_several_teachers_each_is_uncertain():
    student = models.build(segmentors.pspnet(), seed=0)
    teachers = {name: models.build(segmentors.pspnet(), seed=seed) for seed, name in enumerate('ab', 1)}
    entry = dict(type='CWD', layer='backbone.layer4', teacher=['a', 'b'], uncertainty=UNCERTAIN)
    model = mmkd.distill(student, teachers, dict(it=entry))
    methods = model.distillers['it'].methods
    assert [each.levels.uncertainty.passes for each in methods.values()] == [3, 3]


def test_layers_that_are_found_in_the_models_are_uncertain_too():
    model = distilled(dict(type='TOFD'), segmentors.pspnet(), uncertainty=UNCERTAIN)
    assert model.distillers['it'].levels.uncertainty.passes == 3


def test_the_log_says_it():
    model = distilled(dict(type='PKD', layer='neck'), uncertainty=dict())
    assert model.distillers['it'].levels.describe().endswith("no adapter, the teacher's of 5 dropouts with p=0.1")


@pytest.mark.parametrize(
    ('entry', 'message'),
    [
        (dict(type='KD', uncertainty=UNCERTAIN), 'uncertainty: KD does not compare features level by level'),
        (dict(type='FGD', uncertainty=dict(passes=0)), 'uncertainty: passes=0: expected a whole number'),
        (dict(type='FGD', uncertainty=dict(p=1.0)), 'uncertainty: p=1.0: expected a probability above 0 and below 1'),
        (dict(type='FGD', uncertainty=dict(rate=0.1)), r'uncertainty={.*}: expected a dict such as dict\(passes=5'),
        (dict(type='FGD', uncertainty=5), 'uncertainty=5: expected a dict'),
    ],
)
def test_what_cannot_be_is_refused(entry, message):
    with pytest.raises(ConfigError, match=r'distillers.it\.' + message) as error:
        distilled(entry)
    assert '\n' not in str(error.value)
