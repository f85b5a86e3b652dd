import math

import pytest
import torch
import torch.nn.functional as F

from mmkd.distill import distill
from mmkd.distillers.generic.cwd import CWD, channel_wise_divergence
from mmkd.errors import ConfigError
from mmkd.taps import Taps
from mmkd.testing import models, segmentors
from mmkd.testing.batches import random_batch
from mmkd.testing.closed_form import closed_form_inputs


def plain_loops(student, teacher, tau):
    """The formula, position by position, in float64."""
    batch, channels, height, width = student.shape
    total = 0.0
    for b in range(batch):
        for c in range(channels):
            logits = [(student[b, c].flatten().tolist(), 0), (teacher[b, c].flatten().tolist(), 1)]
            p = {}
            for values, which in logits:
                exponentials = [math.exp(value / tau) for value in values]
                p[which] = [each / sum(exponentials) for each in exponentials]
            total += sum(p[1][i] * math.log(p[1][i] / p[0][i]) for i in range(height * width))
    return tau**2 * total / (batch * channels)


def test_the_value_that_two_public_implementations_give():
    student, teacher = closed_form_inputs((2, 5, 4, 6))
    assert channel_wise_divergence(student, teacher, tau=1.0).item() == pytest.approx(1.2277164, rel=1e-5)


@pytest.mark.parametrize('tau', [0.5, 1.0, 4.0])
def test_the_formula_as_plain_loops(tau):
    student, teacher = torch.randn(2, 2, 3, 4, 5, dtype=torch.float64)
    assert channel_wise_divergence(student, teacher, tau).item() == pytest.approx(
        plain_loops(student, teacher, tau), rel=1e-6
    )


def test_zero_for_equal_inputs():
    feature = torch.randn(2, 3, 8, 8)
    assert channel_wise_divergence(feature, feature).item() == pytest.approx(0, abs=1e-7)


def test_a_constant_added_to_a_channel_changes_nothing():
    student, teacher = torch.randn(2, 2, 3, 8, 8)
    offset = 5 * torch.randn(2, 3, 1, 1)
    expected = channel_wise_divergence(student, teacher)
    torch.testing.assert_close(channel_wise_divergence(student + offset, teacher), expected)
    torch.testing.assert_close(channel_wise_divergence(student, teacher + offset), expected)


def test_a_batch_of_one_weighs_as_much_as_a_larger_one():
    student, teacher = torch.randn(2, 1, 3, 8, 8)
    one = channel_wise_divergence(student, teacher)
    torch.testing.assert_close(channel_wise_divergence(student.repeat(4, 1, 1, 1), teacher.repeat(4, 1, 1, 1)), one)


def test_channels_last_inputs_and_extreme_logits():
    student, teacher = torch.randn(2, 2, 3, 8, 8)
    expected = channel_wise_divergence(student, teacher)
    last = channel_wise_divergence(*(each.contiguous(memory_format=torch.channels_last) for each in (student, teacher)))
    torch.testing.assert_close(last, expected)
    student = student.clone()
    student[0, 0, 0, 0] += 200
    student.requires_grad_()
    loss = channel_wise_divergence(student, teacher)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()


def test_the_gradient_reaches_the_student_and_not_the_teacher():
    student, teacher = torch.randn(2, 2, 3, 8, 8).requires_grad_(), torch.randn(2, 2, 3, 8, 8).requires_grad_()
    student, teacher = student[0], teacher[0]
    student.retain_grad(), teacher.retain_grad()
    channel_wise_divergence(student, teacher).backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


# --- as a distiller


@pytest.mark.parametrize('tau', [1.0, 3.0])
def test_layers_are_adapted_and_summed_at_their_temperature_and_weighed(tau, tmp_path):
    """Logits of the same channels and stride, and features of others, which an adapter of the user's maps."""
    teacher = segmentors.deeplabv3(24)
    checkpoint = models.save_weights(teacher, tmp_path / 'teacher.pth')
    layers = ['decode_head.conv_seg', 'backbone.layer3']
    others = ['decode_head.conv_seg', 'decode_head.bottleneck']
    options = dict(type='CWD', layer=layers, teacher_layer=others, tau=tau, loss_weight=7.0)
    student = models.build(segmentors.pspnet(), seed=0)
    model = distill(student, dict(config=teacher, checkpoint=checkpoint), dict(cwd=options))
    model.sources['teacher'].load()
    model.train()
    data = model.data_preprocessor(random_batch(model, (2, 3, 64, 96)), True)
    with Taps(model, layers) as taps:
        loss = model(**data, mode='loss')['cwd.loss']
    read = model.sources['teacher'](data['inputs'], None)
    expected = 0.0
    for layer, other, adapter in zip(layers, others, model.distillers['cwd'].levels.adapters, strict=True):
        (s,), (t,) = taps[layer], read[other]
        s = F.interpolate(adapter(s), t.shape[2:], mode='bilinear')
        expected += plain_loops(s.double(), t.double(), tau)
    assert loss.item() == pytest.approx(7 * expected, rel=1e-4)
    assert [type(each).__name__ for each in model.distillers['cwd'].levels.adapters] == ['Identity', 'ConvAdapter']
    loss.backward()
    assert all(each.grad.any() for each in (model.decode_head.conv_seg.weight, model.backbone.layer3[0].conv1.weight))


def test_standardized_it_compares_what_a_batch_norm_puts_out():
    student, teacher = torch.randn(2, 2, 3, 4, 5, dtype=torch.float64)
    method = CWD('neck', tau=2.0, standardize=True)
    s, t = (F.batch_norm(5 * each + 2, None, None, training=True) for each in (student, teacher))
    expected = plain_loops(s, t, 2.0)
    assert method.compare(5 * student + 2, 5 * teacher + 2).item() == pytest.approx(expected, rel=1e-6)
    # the scale of a channel does not matter any more
    assert method.compare(7 * student, teacher).item() == pytest.approx(
        method.compare(student, teacher).item(), rel=1e-4
    )
    assert CWD('neck', tau=2.0).compare(7 * student, teacher) > 2 * method.compare(student, teacher)


@pytest.mark.parametrize(
    'options', [dict(standardize='yes'), dict(tau=0), dict(tau='4'), dict(match='size'), dict(loss_weight='2')]
)
def test_options_out_of_range_are_errors(options):
    with pytest.raises(ConfigError, match=next(iter(options)).removeprefix('loss_')):
        CWD('neck', **options)
