import pytest
import torch
from torch import nn

from mmkd.adapters import Adapters, ConvAdapter
from mmkd.errors import ConfigError


def maps(channels, *sizes):
    return [torch.randn(2, channels, size, size) for size in sizes]


def test_auto_adds_nothing_where_shapes_agree():
    adapters = Adapters('auto', maps(8, 16, 8), maps(8, 16, 8))
    assert not list(adapters.parameters())
    student = maps(8, 16, 8)
    assert all(adapted is level for adapted, level in zip(adapters(student, maps(8, 16, 8)), student))


def test_auto_makes_a_1x1_convolution_exactly_where_channels_differ():
    adapters = Adapters('auto', [*maps(8, 16), *maps(4, 8)], maps(8, 16, 8))
    assert isinstance(adapters[0], nn.Identity)
    assert adapters[1].conv.weight.shape == (8, 4, 1, 1)


def test_auto_resizes_where_strides_differ_whatever_the_image_size():
    adapters = Adapters('auto', maps(8, 16), maps(8, 32))
    adapted = adapters([torch.randn(2, 8, 10, 12)], [torch.randn(2, 8, 20, 24)])
    assert adapted[0].shape == (2, 8, 20, 24)


def test_channels_may_differ_where_they_are_not_compared():
    adapters = Adapters('auto', maps(8, 16), maps(6, 32), same_channels=False)
    assert not list(adapters.parameters())
    assert adapters(maps(8, 10), maps(6, 20))[0].shape == (2, 8, 20, 20)


def test_a_dict_builds_that_adapter_for_each_level():
    adapters = Adapters(dict(type='ConvAdapter', kernel_size=3), maps(8, 16, 8), maps(6, 16, 8))
    assert [type(each) for each in adapters] == [ConvAdapter, ConvAdapter]
    assert adapters(maps(8, 16, 8), maps(6, 16, 8))[1].shape == (2, 6, 8, 8)


def test_batch_norm_of_an_adapter_is_over_its_own_batch_in_training_and_evaluation():
    """Nothing of earlier batches is kept, so nothing has to be synchronised or stored."""
    adapter = ConvAdapter(8, 5, bias=False, norm=True, relu=True)
    assert set(adapter.state_dict()) == {'conv.weight', 'norm.weight', 'norm.bias'}
    assert not list(adapter.buffers())
    torch.nn.init.uniform_(adapter.norm.weight, 0.5, 1.5)
    torch.nn.init.uniform_(adapter.norm.bias, -0.5, 0.5)
    (feature,) = maps(8, 6)
    convolved = adapter.conv(feature)
    mean, deviation = (each.view(1, 5, 1, 1) for each in (convolved.mean((0, 2, 3)), convolved.std((0, 2, 3), False)))
    weight, bias = (each.view(1, 5, 1, 1) for each in (adapter.norm.weight, adapter.norm.bias))
    expected = ((convolved - mean) / deviation * weight + bias).clamp(min=0)
    adapter(3 * feature + 1)
    for module in (adapter.train(), adapter.eval()):
        torch.testing.assert_close(module(feature), expected, rtol=1e-4, atol=1e-4)
    adapter(feature).sum().backward()
    assert all(each.grad.any() for each in adapter.parameters())


def test_an_adapter_has_no_norm_unless_asked():
    (feature,) = maps(8, 6)
    adapter = ConvAdapter(8, 5)
    assert set(adapter.state_dict()) == {'conv.weight', 'conv.bias'}
    assert torch.equal(adapter(feature), adapter.conv(feature))


class Doubled(nn.Module):
    def __init__(self, in_channels, out_channels):
        super().__init__()

    def forward(self, feature):
        return 2 * feature


def test_an_adapter_by_its_dotted_path():
    adapters = Adapters(dict(type=f'{__name__}.Doubled'), maps(8, 4), maps(8, 4))
    (student,) = maps(8, 4)
    assert torch.equal(adapters([student], maps(8, 4))[0], 2 * student)


def test_another_number_of_levels_than_probed_is_no_silent_truncation():
    adapters = Adapters('auto', maps(8, 16, 8), maps(8, 16, 8))
    with pytest.raises(ValueError, match='zip'):
        adapters(maps(8, 16), maps(8, 16))


@pytest.mark.parametrize(
    ('spec', 'student', 'teacher', 'message'),
    [
        (None, maps(8, 16), maps(6, 16), "8 and 6 channels with adapter=None; use adapter='auto'"),
        (None, maps(8, 16), maps(8, 8), r"size \(16, 16\) and \(8, 8\).*different strides.*adapter='auto'"),
        ('auto', maps(8, 16, 8), maps(8, 16), '2 and 1 levels'),
        ('auto', [torch.randn(2, 8)], [torch.randn(2, 8)], 'expected .B, C, H, W. maps'),
        ('conv', maps(8, 16), maps(8, 16), "adapter='conv': expected 'auto', None or a dict"),
    ],
)
def test_shapes_that_cannot_agree_are_errors(spec, student, teacher, message):
    with pytest.raises(ConfigError, match=message):
        Adapters(spec, student, teacher)


def test_weights_from_a_normal_distribution_that_is_cut_at_twice_its_deviation():
    adapter = ConvAdapter(64, 64, 3, init_std=0.1)
    weight = adapter.conv.weight
    assert 0.19 < weight.abs().max() <= 0.2
    assert weight.std().item() == pytest.approx(0.1 * 0.88, rel=0.02)  # of a standard normal cut at 2: 0.880
    assert not adapter.conv.bias.any()
    assert ConvAdapter(8, 8, bias=False, init_std=0.1).conv.bias is None
