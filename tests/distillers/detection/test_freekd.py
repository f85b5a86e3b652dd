import math

import pytest
import torch

import mmkd
from mmkd.distillers.detection.freekd import FreeKD, FrequencyPrompts, band_loss, haar, inverse_haar
from mmkd.distillers.tokens import overlap
from mmkd.errors import ConfigError
from mmkd.testing import detectors, models
from mmkd.testing.batches import random_batch
from mmkd.testing.closed_form import closed_form_inputs


def haar_plain_loops(rows):
    """One step of a list of rows: the low band and the three details."""
    height, width = len(rows), len(rows[0])

    def at(y, x):
        return rows[y][x] if y < height and x < width else 0.0

    signs = ((1, 1, 1, 1), (1, 1, -1, -1), (1, -1, 1, -1), (1, -1, -1, 1))
    return [
        [
            [
                sum(k * at(2 * y + i // 2, 2 * x + i % 2) for i, k in enumerate(each)) / 2
                for x in range((width + 1) // 2)
            ]
            for y in range((height + 1) // 2)
        ]
        for each in signs
    ]


@pytest.mark.parametrize('size', [(8, 16), (7, 13), (1, 5)])
def test_the_transform_as_plain_loops_and_back(size):
    feature = torch.randn(2, 3, *size, dtype=torch.float64)
    low, details = haar(feature)
    for b in range(2):
        for c in range(3):
            band = feature[b, c].tolist()
            for each in details:
                band, *found = haar_plain_loops(band)
                torch.testing.assert_close(each[b, c], torch.tensor(found, dtype=torch.float64))
            torch.testing.assert_close(low[b, c], torch.tensor(band, dtype=torch.float64))
    torch.testing.assert_close(inverse_haar(low, details, size), feature)


def test_the_transform_keeps_the_energy_and_a_constant_has_no_details():
    feature = torch.randn(1, 2, 16, 24, dtype=torch.float64)
    low, details = haar(feature)
    energy = low.square().sum() + sum(each.square().sum() for each in details)
    torch.testing.assert_close(energy, feature.square().sum())
    low, details = haar(torch.ones(1, 1, 8, 8))
    assert low.item() == 8
    assert all((each == 0).all() for each in details)


def test_the_loss_as_plain_loops():
    student, teacher = ([torch.randn(2, 3, 3, *size) for size in ((4, 5), (2, 3))] for _ in range(2))
    masks = [torch.rand(2, 4, *each.shape[3:]) for each in student]
    expected = 0.0
    for s, t, m in zip(student, teacher, masks):
        values = [
            m[b, k, y, x].item() * abs(s[b, c, o, y, x].item() - t[b, c, o, y, x].item())
            for b in range(2)
            for k in range(4)
            for c in range(3)
            for o in range(3)
            for y in range(m.shape[2])
            for x in range(m.shape[3])
        ]
        expected += math.fsum(values) / len(values)
    assert band_loss(student, teacher, masks).item() == pytest.approx(expected, rel=1e-5)
    assert band_loss(teacher, teacher, masks) == 0


@pytest.mark.parametrize(
    ('size', 'shown', 'covered', 'loss'),
    [((8, 16), 1946.9619141, 3.7936611, 2.6041436), ((7, 13), 1405.0976563, 3.8005669, 1.6149409)],
)
def test_the_values_of_the_authors_code(size, shown, covered, loss):
    """Of FreeKD (MIT, commit caec644) with pytorch_wavelets on the closed-form inputs; of 7 rows it puts out 8."""
    student, teacher = closed_form_inputs((2, 4, *size))
    prompts = FrequencyPrompts(4, 3)
    with torch.no_grad():
        prompts.tokens.value.copy_(0.1 * closed_form_inputs((4, 3, 4))[0])
    prompts.tokens.keep()
    found, overlaps = prompts.mask(teacher)
    assert found.shape == teacher.shape
    assert found.abs().sum().item() == pytest.approx(shown, rel=1e-5)
    assert overlaps.item() == pytest.approx(covered, rel=1e-5)
    assert prompts.compare(student, teacher, 0).item() == pytest.approx(loss, rel=1e-5)


def test_an_offset_of_a_channel_is_no_detail():
    student, teacher = torch.randn(2, 2, 4, 16, 24)
    prompts = FrequencyPrompts(4, 3)
    expected = prompts.compare(student, teacher, 0)
    torch.testing.assert_close(prompts.compare(student + torch.randn(2, 4, 1, 1), teacher, 0), expected)


def test_masks_of_one_show_the_feature_once_for_each_token():
    feature, prompts = torch.ones(1, 4, 8, 8), FrequencyPrompts(4, 3)
    torch.nn.init.constant_(prompts.tokens.value, 100.0)
    found, _ = prompts.mask(feature)  # which has a low band alone
    torch.testing.assert_close(found, 3 * feature)
    assert overlap(torch.ones(1, 3, 2, 2)) == 1


def test_prompts_learn_first_and_stay_then():
    model = mmkd.distill(
        models.build(detectors.retinanet(), seed=0),
        models.build(detectors.fcos(24), seed=1),
        dict(it=dict(type='FreeKD', token_steps=2)),
    )
    model.init_weights()
    batch = model.train().data_preprocessor(random_batch(model, (2, 3, 96, 128), 4), True)
    tokens = model.distillers['it'].tokens
    optimizer, kept = torch.optim.SGD(tokens.parameters(), lr=0.01, momentum=0.9, weight_decay=1.0), []
    for index in range(4):
        found = model(**batch, mode='loss')
        model.zero_grad()
        (found['it.loss'] + found['it.loss_token']).backward()
        assert (found['it.loss_token'] > found['it.overlap']) == (index < 2)
        assert (found['it.loss'] > 0) == (index >= 2)
        assert (model.backbone.layer2[0].conv1.weight.grad.abs().sum() > 0) == (index >= 2)
        assert all(each.value.grad.abs().sum() > 0 for each in tokens.modules() if hasattr(each, 'kept')) == (index < 2)
        optimizer.step()
        kept.append(tokens[0].tokens.kept.clone())
    assert not torch.equal(kept[1], kept[2])
    assert torch.equal(kept[2], kept[3])


@pytest.mark.parametrize('options', [dict(tokens=0), dict(token_steps=1.5), dict(loss_weight=-1)])
def test_options_out_of_range_are_errors(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        FreeKD(**options)
