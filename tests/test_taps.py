import pytest
import torch
from torch import nn

from mmkd.errors import ConfigError
from mmkd.hosts.running import probe
from mmkd.taps import Taps, find_layer, join
from mmkd.testing import detectors, models


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Conv2d(4, 2, 1)
        self.unused = nn.Conv2d(4, 2, 1)
        self.finished = 0

    def forward(self, images):
        feature = self.relu(self.stem(images))
        outputs = [self.head(feature), self.head(feature[..., ::2, ::2])]
        self.finished += 1
        return outputs


@pytest.fixture
def images():
    return torch.randn(1, 3, 8, 8)


def test_a_layer_called_once_gives_a_tuple_of_one(images):
    model = Toy()
    with Taps(model, ['relu']) as taps:
        model(images)
    (feature,) = taps['relu']
    assert feature.shape == (1, 4, 8, 8)


def test_a_layer_called_once_per_level_gives_one_entry_per_call(images):
    model = Toy()
    with Taps(model, ['head']) as taps:
        outputs = model(images)
    assert len(taps['head']) == 2
    assert all(torch.equal(tapped, out) for tapped, out in zip(taps['head'], outputs))


def test_inputs_of_a_layer(images):
    model = Toy()
    with Taps(model, ['stem:input']) as taps:
        model(images)
    assert taps['stem:input'][0] is images
    assert taps.per_call('stem:input')[0] is images


def test_several_inputs_of_a_layer_are_a_tuple(images):
    model = nn.ModuleDict(dict(join=nn.Bilinear(4, 5, 6)))
    one, other = torch.randn(2, 4), torch.randn(2, 5)
    with Taps(model, ['join:input']) as taps:
        model['join'](one, other)
    ((first, second),) = taps.per_call('join:input')
    assert first is one
    assert second is other


class Block(nn.Module):
    """Calls one activation twice, as the blocks of ResNets do."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, images):
        return self.relu(self.relu(self.conv(images)) + images)


def test_an_activation_in_place_shows_what_it_took_in(images):
    model = Block()
    with Taps(model, ['relu:input', 'relu:last_input']) as taps:
        model(images)
    first = model.conv(images)
    second = first.relu() + images
    assert second.min() < 0
    assert [torch.equal(*each) for each in zip(taps['relu:input'], (first, second), strict=True)] == [True, True]
    (last,) = taps['relu:last_input']
    assert torch.equal(last, second)
    assert taps.per_call('relu:last_input')[0] is last
    last.sum().backward()
    assert model.conv.weight.grad.any()


def test_the_last_input_waits_for_all_calls(images):
    model = Block()
    with Taps(model, ['relu:last_input']) as full:
        model(images)
    assert full.calls == {'relu:last_input': 2}
    with Taps(model, ['relu:last_input'], stop_after=full.calls) as taps:
        model(images)
    assert torch.equal(taps['relu:last_input'][0], full['relu:last_input'][0])
    one, other = Taps(model, ['relu:last_input']), Taps(model, ['relu:last_input'])
    for part, image in ((one, images), (other, 2 * images)):
        with part:
            model(image)
    (joined,) = join([([1], one), ([0], other)])['relu:last_input']
    assert torch.equal(joined[1:], full['relu:last_input'][0])


def test_the_nearest_names_are_those_of_the_plain_model():
    model = nn.ModuleDict({each: nn.ModuleDict(dict(neck=nn.Identity())) for each in ('distillers', 'sources', 'own')})
    for name in ('sources', 'distillers'):
        with pytest.raises(ConfigError, match='no such module; the nearest are') as error:
            Taps(model, [f'{name}.nek'])
        assert f"'{name}.neck'" not in str(error.value)


def test_an_fpn_gives_its_levels():
    model = models.build(detectors.retinanet())
    taps = probe(model, ['neck'])
    assert [tuple(level.shape) for level in taps['neck']] == [(1, 16, 32, 32), (1, 16, 16, 16), (1, 16, 8, 8)]


def test_hooks_exist_only_inside_the_block(images):
    model = Toy()
    with Taps(model, ['head']):
        assert len(model.head._forward_hooks) == 1
    assert not model.head._forward_hooks
    with pytest.raises(RuntimeError), Taps(model, ['head']):
        raise RuntimeError
    assert not model.head._forward_hooks


def test_an_output_changed_in_place_is_an_error(images):
    model = Toy()
    with Taps(model, ['stem']) as taps:
        model(images)
    with pytest.raises(ConfigError, match="'stem'.*changed in place"):
        taps['stem']


def test_a_layer_that_was_never_called_is_an_error(images):
    model = Toy()
    with Taps(model, ['unused']) as taps:
        model(images)
    with pytest.raises(ConfigError, match="'unused'.*never called.*; tap a module that is,"):
        taps['unused']


def test_an_unknown_layer_names_the_nearest():
    model = models.build(detectors.retinanet())
    with pytest.raises(ConfigError, match="'bbox_head.retina_cl'.*'bbox_head.retina_cls'"):
        find_layer(model, 'bbox_head.retina_cl')


def test_the_pass_ends_at_the_last_tapped_call(images):
    model = Toy()
    with Taps(model, ['relu'], stop_after={'relu': 1}) as taps:
        model(images)
    assert model.finished == 0
    assert taps['relu'][0].shape == (1, 4, 8, 8)
    with Taps(model, ['head'], stop_after={'head': 2}) as taps:
        model(images)
    assert len(taps['head']) == 2


def test_errors_of_the_model_are_not_swallowed():
    model = Toy()
    with pytest.raises(RuntimeError, match='channels'), Taps(model, ['relu'], stop_after={'relu': 1}):
        model(torch.randn(1, 5, 8, 8))


def test_half_precision_is_handed_out_as_float32(images):
    model = Toy()
    with torch.autocast('cpu', torch.bfloat16), Taps(model, ['head']) as taps:
        outputs = model(images)
    assert outputs[0].dtype is torch.bfloat16
    assert all(level.dtype is torch.float32 for level in taps['head'])
