import pytest
import torch
from mmcv.cnn import ConvModule, DepthwiseSeparableConvModule
from torch import nn

from mmkd.hosts.activations import before_activation
from mmkd.taps import Taps
from mmkd.testing import detectors, models, segmentors


@pytest.mark.parametrize(
    ('family', 'layer', 'name'),
    [
        (segmentors.pspnet, 'backbone.layer4', 'backbone.layer4.1.relu:last_input'),
        (segmentors.pspnet, 'backbone.layer4.0', 'backbone.layer4.0.relu:last_input'),
        (segmentors.pspnet, 'decode_head.bottleneck', 'decode_head.bottleneck.activate:input'),
        (segmentors.pspnet, 'decode_head.bottleneck.activate', 'decode_head.bottleneck.activate:input'),
        (segmentors.pspnet, 'decode_head.bottleneck:input', 'decode_head.bottleneck:input'),
        (segmentors.pspnet, 'decode_head.conv_seg', 'decode_head.conv_seg'),
        (segmentors.pspnet, 'no.such', 'no.such'),
        (segmentors.segformer, 'decode_head.fusion_conv', 'decode_head.fusion_conv.activate:input'),
        (detectors.retinanet, 'neck', 'neck'),
        (detectors.retinanet, 'neck.fpn_convs.0', 'neck.fpn_convs.0'),
    ],
)
def test_where_layers_of_models_are_read(family, layer, name):
    assert before_activation(models.build(family()), layer) == name


def test_modules_of_mmcv():
    model = nn.ModuleDict(
        dict(
            separable=nn.Sequential(DepthwiseSeparableConvModule(3, 4, 3)),
            before=ConvModule(3, 4, 1, order=('act', 'conv', 'norm')),
            plain=ConvModule(3, 4, 1, act_cfg=None),
            empty=nn.Sequential(),
        )
    )
    assert before_activation(model, 'separable') == 'separable.0.pointwise_conv.activate:input'
    assert [before_activation(model, each) for each in ('before', 'plain', 'empty')] == ['before', 'plain', 'empty']


@pytest.mark.parametrize('layer', ['backbone.layer3', 'decode_head.bottleneck'])
def test_the_activation_makes_the_layers_output_of_it(layer):
    model = models.build(segmentors.pspnet()).eval()
    before = before_activation(model, layer)
    with Taps(model, [layer, before]) as taps:
        model(torch.randn(2, 3, 64, 64))
    (value,), (output,) = taps[before], taps[layer]
    assert (value < 0).any()
    assert torch.equal(value.relu(), output)
