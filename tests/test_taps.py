import pytest
import torch
from torch import nn

from mmkd.distill import distill
from mmkd.errors import ConfigError
from mmkd.hosts.running import probe, run
from mmkd.taps import Taps, find_layer
from mmkd.testing import detectors, models, segmentors
from mmkd.testing.batches import random_batch


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
    with pytest.raises(ConfigError, match="'unused'.*never called.*conv_seg"):
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


def test_run_goes_no_further_than_the_neck():
    model = models.build(detectors.retinanet())
    calls = []
    model.bbox_head.register_forward_hook(lambda *_: calls.append('head'))
    run(model, ['backbone.layer1', 'neck'], torch.randn(1, 3, 64, 64), None)
    assert not calls
    run(model, ['neck', 'bbox_head.retina_cls'], torch.randn(1, 3, 64, 64), None)
    assert calls == ['head']


def test_a_probe_leaves_no_trace():
    model = models.build(detectors.retinanet(backbone=dict(norm_eval=False))).train()
    model.neck.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    probe(model, ['neck', 'bbox_head'])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)


# --- segmentors


def cascade(channels=16):
    """An FCN whose logits an OCR head refines."""
    config = segmentors.pspnet(channels)
    fcn, common = config.pop('auxiliary_head'), dict(norm_cfg=dict(type='BN'), num_classes=19, channels=channels)
    fcn.num_convs, fcn.in_index, fcn.in_channels = 1, 3, 64
    ocr = dict(type='OCRHead', in_channels=64, in_index=3, ocr_channels=8, dropout_ratio=0.1, **common)
    ocr.update(align_corners=False, loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False))
    config.update(type='CascadeEncoderDecoder', num_stages=2, decode_head=[fcn, ocr])
    return config


def segmentor_batch(model):
    labels = models.build(segmentors.pspnet())  # what a batch needs to know of a segmentor
    return model.data_preprocessor(random_batch(labels, (2, 3, 64, 96)), True)


@pytest.mark.parametrize(
    ('config', 'layers'),
    [
        (segmentors.pspnet(), ['auxiliary_head.conv_seg', 'decode_head.conv_seg', 'backbone.layer2']),
        (segmentors.pspnet(), ['auxiliary_head.convs.0']),
        (segmentors.segformer(), ['decode_head.fusion_conv', 'decode_head.conv_seg']),
        (cascade(), ['decode_head.0.conv_seg', 'decode_head.1.bottleneck', 'decode_head.1.conv_seg']),
    ],
)
def test_heads_of_a_segmentor_run_as_in_training(config, layers):
    """Auxiliary ones too, which mmseg's tensor mode leaves out; of a cascade each head takes the one before."""
    model = models.build(config, seed=0).eval()
    batch = segmentor_batch(model)
    with torch.no_grad(), Taps(model, layers) as expected:
        model(**batch, mode='loss')
    with torch.no_grad(), Taps(model, layers) as taps:
        run(model, layers, **batch)
    for layer in layers:
        assert torch.equal(taps[layer][0], expected[layer][0])
        assert len(taps[layer]) == 1  # in training a cascade calls its first head twice


def test_only_the_wanted_heads_of_a_segmentor_run():
    model = models.build(segmentors.pspnet()).eval()
    calls = []
    for name in ('decode_head.conv_seg', 'auxiliary_head.conv_seg'):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name))
    images = torch.randn(1, 3, 64, 64)
    for layers in (['backbone.layer4'], ['auxiliary_head.conv_seg'], ['decode_head.bottleneck']):
        run(model, layers, images, None)
    assert calls == ['auxiliary_head.conv_seg', 'decode_head.conv_seg']


@pytest.mark.parametrize('layer', ['decode_head', 'auxiliary_head'])
def test_a_segmentors_head_as_a_whole_is_an_error_with_advice(layer):
    model = models.build(segmentors.pspnet())
    with pytest.raises(ConfigError, match=rf"{layer!r} .*never called.*tap 'decode_head.conv_seg', not 'decode_head'"):
        probe(model, [layer])[layer]


def test_a_cascade_learns_from_a_cascade(tmp_path):
    teacher = cascade(24)
    layers = dict(last='decode_head.1.conv_seg', first='decode_head.0.conv_seg')
    model = distill(
        models.build(cascade(), seed=0),
        dict(config=teacher, checkpoint=models.save_weights(teacher, tmp_path / 'teacher.pth')),
        {name: dict(type='KD', layer=layer) for name, layer in layers.items()},
    )
    model.sources['teacher'].load()
    losses = model.train()(**segmentor_batch(model), mode='loss')
    for index, name in enumerate(('first', 'last')):
        assert losses[f'{name}.loss'] > 0
        (gradient,) = torch.autograd.grad(
            losses[f'{name}.loss'], model.decode_head[index].conv_seg.weight, retain_graph=True
        )
        assert gradient.any()
