import math

import pytest
import torch
import torch.nn.functional as F

from mmkd.distill import distill
from mmkd.distillers.generic.at import AT, FORMS, attention_distance, attention_map
from mmkd.errors import ConfigError
from mmkd.taps import Taps
from mmkd.testing import detectors, models, segmentors
from mmkd.testing.batches import random_batch
from mmkd.testing.closed_form import closed_form_inputs

LAYERS = [f'backbone.layer{stage}' for stage in (1, 2, 3, 4)]


def plain_loops(student, teacher, form, power):
    """The formula, image by image and position by position, in float64."""
    batch, _, height, width = student.shape
    total = 0.0
    for b in range(batch):
        maps = []
        for feature in (student[b], teacher[b]):
            v = [
                sum(abs(value) ** power for value in feature[:, y, x].tolist()) / len(feature)
                for y in range(height)
                for x in range(width)
            ]
            length = math.sqrt(sum(value**2 for value in v))
            maps.append([value / length for value in v])
        squares = sum((p - q) ** 2 for p, q in zip(*maps))
        total += math.sqrt(squares) if form == 'norm' else squares
    return total / batch / (height * width if form == 'mean' else 1)


def distance(student, teacher, form='mean', power=2.0):
    return attention_distance(attention_map(student, power), attention_map(teacher, power), form)


@pytest.mark.parametrize(('form', 'value'), [('mean', 0.00425201), ('sum', 0.10204832), ('norm', 0.3193503)])
def test_the_values_of_the_authors_code_and_of_the_paper(form, value):
    student, teacher = closed_form_inputs((2, 3, 4, 6), (2, 7, 4, 6))
    assert distance(student, teacher, form).item() == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('power', [1.0, 2.0, 3.5])
def test_the_formula_as_plain_loops(form, power):
    student, teacher = torch.randn(3, 4, 5, 6, dtype=torch.float64), torch.randn(3, 7, 5, 6, dtype=torch.float64)
    expected = plain_loops(student, teacher, form, power)
    assert distance(student, teacher, form, power).item() == pytest.approx(expected, rel=1e-6)


def test_a_map_is_the_mean_over_channels():
    feature = torch.randn(2, 7, 5, 6)
    torch.testing.assert_close(attention_map(feature), feature.square().mean(1, keepdim=True))


@pytest.mark.parametrize('form', FORMS)
def test_zero_for_equal_inputs_up_to_a_factor_and_the_order_of_channels(form):
    student = torch.randn(2, 4, 5, 6, requires_grad=True)
    loss = distance(student, -3 * student[:, [2, 0, 3, 1]], form)
    assert loss.item() == pytest.approx(0, abs=1e-6)
    loss.backward()
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize('form', FORMS)
def test_maps_of_zeros_are_finite_and_differentiable(form):
    """A dead ReLU's."""
    student = torch.zeros(2, 4, 5, 6, requires_grad=True)
    for teacher in (torch.zeros(2, 7, 5, 6), torch.randn(2, 7, 5, 6)):
        loss = distance(student, teacher, form)
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize('form', FORMS)
def test_maps_that_are_the_same_everywhere_teach_nothing_and_stay_finite(form):
    """Those of a layer norm over the channels, whatever its input."""
    student, teacher = (F.layer_norm(torch.randn(2, 5, 6, c), (c,)).movedim(-1, 1) for c in (4, 7))
    student.requires_grad_()
    loss = distance(student, teacher, form)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-4)
    assert torch.isfinite(student.grad).all()
    student.grad = None
    distance(student, torch.randn(2, 7, 5, 6), form).backward()
    assert torch.isfinite(student.grad).all()
    assert student.grad.any()


@pytest.mark.parametrize('form', FORMS)
def test_a_batch_of_one_weighs_as_much_as_a_larger_one(form):
    student, teacher = torch.randn(1, 4, 5, 6), torch.randn(1, 7, 5, 6)
    three = [each.repeat(3, 1, 1, 1) for each in (student, teacher)]
    torch.testing.assert_close(distance(*three, form), distance(student, teacher, form))


def test_channels_last_inputs_and_extreme_features():
    student, teacher = torch.randn(2, 4, 5, 6), torch.randn(2, 7, 5, 6)
    last = [each.contiguous(memory_format=torch.channels_last) for each in (student, teacher)]
    torch.testing.assert_close(distance(*last), distance(student, teacher))
    student[0, 0, 0, 0] += 200
    student.requires_grad_()
    distance(student, teacher).backward()
    assert torch.isfinite(student.grad).all()


def test_the_gradient_reaches_the_student_and_not_the_teacher():
    student, teacher = (torch.randn(2, 4, 5, 6, requires_grad=True) for _ in range(2))
    distance(student, teacher).backward()
    assert student.grad.any()
    assert teacher.grad is None


# --- as a distiller


def pair(tmp_path, student, teacher, **options):
    checkpoint = models.save_weights(teacher, tmp_path / 'teacher.pth')
    model = distill(
        models.build(student, seed=0), dict(config=teacher, checkpoint=checkpoint), dict(at=dict(type='AT', **options))
    )
    model.sources['teacher'].load()
    return model.train()


@pytest.mark.parametrize(
    'teacher', [segmentors.pspnet(24, base=16), segmentors.deeplabv3(24, base=12)], ids=['psp', 'aspp']
)
@pytest.mark.parametrize(('form', 'power'), [('mean', 2.0), ('sum', 3.0), ('norm', 1.5)])
def test_stages_of_a_teacher_of_other_widths_and_strides(teacher, form, power, tmp_path):
    """DeepLabV3's last two stages have stride 16 here, PSPNet's stride 8."""
    options = dict(loss_weight=70.0, form=form, power=power)
    model = pair(tmp_path, segmentors.pspnet(), teacher, layer=LAYERS, **options)
    data = model.data_preprocessor(random_batch(model, (2, 3, 64, 96)), True)
    taps = model.sources['teacher'](data['inputs'], data['data_samples'])
    with Taps(model, LAYERS) as student:
        model.extract_feat(data['inputs'])
    expected = 0.0
    for layer in LAYERS:
        (s,), (t,) = student[layer], taps[layer]
        assert s.shape[1] != t.shape[1]
        s, t = (each.abs().pow(power).mean(1, keepdim=True) for each in (s, t))
        expected += attention_distance(F.interpolate(s, t.shape[2:], mode='bilinear'), t, form)
    loss = model.distillers.at(student, taps, None)['loss']
    torch.testing.assert_close(loss, 70 * expected)
    loss.backward()
    for layer in LAYERS:
        assert model.get_submodule(layer)[0].conv1.weight.grad.any()
    assert all(each.grad is None for each in model.sources['teacher'].model.parameters())
    assert not list(model.distillers.parameters())


@pytest.mark.parametrize('form', FORMS)
def test_a_training_step_on_a_detectors_pyramid(form, tmp_path):
    model = pair(tmp_path, detectors.retinanet(), detectors.retinanet(24), layer='neck', form=form)
    data = model.data_preprocessor(random_batch(model, (1, 3, 64, 96)), True)
    loss = model(**data, mode='loss')['at.loss']
    assert torch.isfinite(loss)
    assert loss > 0
    loss.backward()
    assert all(conv.conv.weight.grad.any() for conv in model.neck.fpn_convs)


def test_zero_for_equal_networks(tmp_path):
    model = pair(tmp_path, segmentors.pspnet(), segmentors.pspnet(), layer=LAYERS)
    model.load_state_dict(torch.load(tmp_path / 'teacher.pth', weights_only=True)['state_dict'])
    model.eval()
    data = model.data_preprocessor(random_batch(model, (2, 3, 64, 96)), True)
    assert model(**data, mode='loss')['at.loss'].item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    'options', [dict(form='paper'), dict(power=0.5), dict(power='2'), dict(match='size'), dict(loss_weight='2')]
)
def test_options_out_of_range_are_errors(options):
    with pytest.raises(ConfigError, match=next(iter(options)).removeprefix('loss_')):
        AT('neck', **options)


def test_the_least_power_takes_the_mean_of_absolute_values():
    feature = torch.randn(2, 3, 4, 5)
    found = AT('neck', power=1).levels.reduce(feature)
    torch.testing.assert_close(found, feature.abs().mean(1, keepdim=True))
