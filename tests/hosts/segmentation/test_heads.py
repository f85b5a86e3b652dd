"""Which layers are compared by default: found for every head of mmseg, each with the network it is meant for."""

import pytest
import torch

from mmkd.distill import distill
from mmkd.distillers import CIRKD, DAKD, DIST, IFVD, KD, SKD
from mmkd.errors import ConfigError
from mmkd.hosts.running import probe, run
from mmkd.hosts.segmentation.heads import auxiliary_layer, decode_head, feature_layer, logits_layer
from mmkd.taps import Taps
from mmkd.testing import models, segmentors
from mmkd.testing.batches import random_batch

FCN = dict(type='FCNHead', in_channels=64, in_index=3, channels=16, num_convs=1, concat_input=False, num_classes=19)
OCR = dict(
    type='OCRHead', in_channels=64, in_index=3, channels=16, ocr_channels=8, num_classes=19, norm_cfg=dict(type='BN')
)


def with_head(head, **changes):
    """The small PSPNet with another decode head, or several."""
    config = segmentors.pspnet(**changes)
    common = dict(num_classes=19, norm_cfg=dict(type='BN'), dropout_ratio=0.1, align_corners=False)
    common['loss_decode'] = dict(type='CrossEntropyLoss')
    if isinstance(head, list):
        config.update(type='CascadeEncoderDecoder', num_stages=len(head))
    config.decode_head = [common | each for each in head] if isinstance(head, list) else common | head
    return config


def many(**options):
    """Of all stages."""
    return dict(in_channels=[8, 16, 32, 64], in_index=[0, 1, 2, 3], channels=16) | options


def last(**options):
    """Of the last stage."""
    return dict(in_channels=64, in_index=3, channels=16) | options


# head: its config, and the module whose output the classifier is applied to
HEADS = {
    'PSP': (last(type='PSPHead', pool_scales=(1, 2)), 'bottleneck'),
    'ASPP': (last(type='ASPPHead', dilations=(1, 6)), 'bottleneck'),
    'ASPP+': (
        last(type='DepthwiseSeparableASPPHead', dilations=(1, 6), c1_in_channels=8, c1_channels=4),
        'sep_bottleneck',
    ),
    'UPer': (many(type='UPerHead', pool_scales=(1, 2)), 'fpn_bottleneck'),
    'SegFormer': (many(type='SegformerHead'), 'fusion_conv'),
    'FCN': (last(type='FCNHead', num_convs=1, concat_input=False), 'convs'),
    'FCN, concatenated': (last(type='FCNHead', num_convs=1, concat_input=True), 'conv_cat'),
    'sep. FCN': (last(type='DepthwiseSeparableFCNHead', num_convs=1, concat_input=False), 'convs'),
    'non-local': (last(type='NLHead'), 'conv_cat'),
    'CC': (last(type='CCHead'), 'conv_cat'),
    'EMA': (last(type='EMAHead', ema_channels=16, num_bases=4, num_stages=2), 'conv_cat'),
    'ISA': (last(type='ISAHead', isa_channels=8, down_factor=(2, 2)), 'out_conv'),
    'PSA': (last(type='PSAHead', mask_size=(8, 12)), 'bottleneck'),
    'APC': (last(type='APCHead', pool_scales=(1, 2), fusion=True), 'bottleneck'),
    'DM': (last(type='DMHead', filter_sizes=(1, 3), fusion=True), 'bottleneck'),
    'ANN': (many(type='ANNHead', in_channels=[32, 64], in_index=[2, 3], project_channels=8), 'context'),
    'SETR': (last(type='SETRUPHead', num_convs=1, up_scale=2, kernel_size=3), 'up_convs.0'),
    'Hamburger': (many(type='LightHamHead', ham_channels=16, ham_kwargs=dict(MD_R=4)), 'align'),
    'without a dropout': (last(type='PSPHead', pool_scales=(1, 2), dropout_ratio=0), 'bottleneck'),
}


def tapped(config, layers):
    """What the layers of a segmentor in training put out for two images, and the segmentor."""
    model = models.build(config, seed=0).train()
    with Taps(model, layers) as taps:
        run(model, layers, torch.randn(2, 3, 64, 96), None)
    return taps, model


@pytest.mark.parametrize('head', HEADS)
def test_the_map_that_the_classifier_is_applied_to(head):
    """In training: before the dropout."""
    config, last_module = HEADS[head]
    model = models.build(with_head(config))
    layer = feature_layer(model)
    taps, model = tapped(with_head(config), [layer, f'decode_head.{last_module}', 'decode_head.conv_seg'])
    (feature,), (own,) = taps[layer], taps[f'decode_head.{last_module}']
    assert torch.equal(feature, own)
    assert feature.shape[1] == model.decode_head.conv_seg.in_channels
    logits = model.decode_head.conv_seg(feature)
    (found,) = taps['decode_head.conv_seg']
    assert (logits.isclose(found, atol=1e-5).all()) == (model.decode_head.dropout is None)
    assert logits_layer(model) == 'decode_head.conv_seg'


def test_sums_that_no_module_puts_out():
    """SemFPN's of its scales, and DANet's of its two attentions; the latter calls its dropout for others too."""
    fpn = many(type='FPNHead', feature_strides=[4, 8, 8, 8])
    taps, model = tapped(
        with_head(fpn), ['decode_head.dropout:input', *(f'decode_head.scale_heads.{i}' for i in range(4))]
    )
    assert feature_layer(model) == 'decode_head.dropout:input'
    scales = [taps[f'decode_head.scale_heads.{i}'][0] for i in range(4)]
    total = sum(torch.nn.functional.interpolate(each, scales[0].shape[2:], mode='bilinear') for each in scales)
    torch.testing.assert_close(taps['decode_head.dropout:input'][0], total)

    danet = last(type='DAHead', pam_channels=4)
    layers = ['decode_head.conv_seg:input', 'decode_head.pam_out_conv', 'decode_head.cam_out_conv']
    model = models.build(with_head(danet | dict(dropout_ratio=0.1)), seed=0).eval()
    with Taps(model, layers) as taps:
        run(model, layers, torch.randn(2, 3, 64, 96), None)
    assert feature_layer(model) == layers[0]
    torch.testing.assert_close(taps[layers[0]][0], taps[layers[1]][0] + taps[layers[2]][0])


def test_a_users_own_head_is_found_as_the_one_it_is_made_of():
    model = models.build(segmentors.pspnet())
    model.decode_head.__class__ = type('MyHead', (type(model.decode_head),), {})
    assert feature_layer(model) == 'decode_head.dropout:input'


def test_a_cascade_is_compared_at_its_last_head():
    config = with_head([FCN, OCR])
    model = models.build(config)
    assert decode_head(model) is model.decode_head[1]
    assert logits_layer(model) == 'decode_head.1.conv_seg'
    assert feature_layer(model) == 'decode_head.1.dropout:input'
    taps = probe(model, [logits_layer(model), feature_layer(model)])
    assert taps['decode_head.1.conv_seg'][0].shape[1] == 19
    assert taps['decode_head.1.dropout:input'][0].shape[1] == 16


SINGLE = (KD, DIST, IFVD, CIRKD, SKD)


@pytest.mark.parametrize('method', SINGLE, ids=lambda method: method.__name__)
def test_student_and_teacher_are_each_read_at_their_own_heads_layer(method):
    student, teacher = models.build(segmentors.segformer()), models.build(with_head([FCN, OCR]))
    distiller = method(holistic_weight=0) if method is SKD else method()
    distiller.prepare(student, teacher)
    own = ('decode_head.conv_seg', 'decode_head.dropout:input')
    other = ('decode_head.1.conv_seg', 'decode_head.1.dropout:input')
    part = {'KD': slice(0, 1), 'DIST': slice(0, 1), 'SKD': slice(0, 2)}.get(method.__name__, slice(1, 2))
    assert distiller.student_layers == own[part]
    assert distiller.teacher_layers == other[part]


@pytest.mark.parametrize('method', [*SINGLE, DAKD], ids=lambda method: method.__name__)
def test_what_is_named_is_read(method):
    """A student's layer alone is the teacher's too."""
    networks = models.build(segmentors.pspnet()), models.build(segmentors.deeplabv3())
    options = dict(pixel_weight=0, holistic_weight=0) if method is SKD else {}
    name = 'feature_layer' if method is SKD else 'layer'
    more = dict(auxiliary_layer='backbone.layer3') if method is DAKD else {}
    rest = ('backbone.layer3',) if method is DAKD else ()
    for given, expected in (
        ({name: 'backbone.layer1'}, ('backbone.layer1', 'backbone.layer1')),
        ({name: 'backbone.layer1', f'teacher_{name}': 'backbone.layer2'}, ('backbone.layer1', 'backbone.layer2')),
    ):
        distiller = method(**given, **more, **options)
        distiller.prepare(*networks)
        assert (distiller.student_layers, distiller.teacher_layers) == ((expected[0], *rest), (expected[1], *rest))
    if method is DAKD:
        distiller = DAKD(teacher_auxiliary_layer='backbone.layer2')
        distiller.prepare(*networks)
        assert distiller.student_layers == ('decode_head.conv_seg', 'auxiliary_head.conv_seg')
        assert distiller.teacher_layers == ('decode_head.conv_seg', 'backbone.layer2')


def test_a_training_step_of_a_segformer_that_learns_from_a_cascade(tmp_path):
    """Of every method with its defaults."""
    teacher = with_head([FCN, OCR])
    checkpoint = models.save_weights(teacher, tmp_path / 'teacher.pth')
    methods = {each.__name__.lower(): dict(type=each.__name__) for each in SINGLE}
    methods['skd']['holistic_weight'] = 0.0
    student = models.build(segmentors.segformer(), seed=0)
    model = distill(student, dict(config=teacher, checkpoint=checkpoint), methods)
    model.sources['teacher'].load()
    model.train()
    for _ in range(2):
        losses = model(**model.data_preprocessor(random_batch(model, (2, 3, 64, 96)), True), mode='loss')
    own = {key: value for key, value in losses.items() if key.partition('.')[0] in methods}
    assert {key.partition('.')[0] for key in own} == set(methods)
    assert all(torch.isfinite(value) and value > 0 for value in own.values())


@pytest.mark.parametrize('method', ['KD', 'DIST'])
def test_several_logits_are_summed(method, tmp_path):
    """Of a cascade mmseg calls the first head twice in training, and the student is then compared twice."""
    teacher = with_head([FCN, OCR])
    checkpoint = models.save_weights(teacher, tmp_path / 'teacher.pth')
    layers = [f'decode_head.{i}.conv_seg' for i in (0, 1)]
    methods = {f'it{i}': dict(type=method, layer=layer) for i, layer in enumerate((layers, *layers))}
    model = distill(models.build(teacher, seed=0), dict(config=teacher, checkpoint=checkpoint), methods)
    model.sources['teacher'].load()
    model.train()
    losses = model(**model.data_preprocessor(random_batch(model, (2, 3, 64, 96)), True), mode='loss')
    for key in ('loss',) if method == 'KD' else ('loss_inter', 'loss_intra'):
        both, first, second = (losses[f'it{i}.{key}'] for i in range(3))
        assert first > 0
        torch.testing.assert_close(both, first + second)


def headless():
    model = models.build(segmentors.pspnet())
    del model.decode_head.conv_seg
    return model


def pointrend():
    point = dict(type='PointHead', in_channels=[8], in_index=[0], channels=8, num_fcs=1, coarse_pred_each_layer=True)
    return models.build(with_head([FCN, point]))


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (headless, 'has a PSPHead, which has no conv_seg .* set layer .*teacher_layer.* to a module that puts out a'),
        (pointrend, "has a PointHead, which has no conv_seg .* set layer .* to one such as 'decode_head.0.conv_seg'"),
        (lambda: models.build(segmentors.pspnet()).backbone, 'ResNetV1c has no decode_head; name the layers'),
    ],
)
@pytest.mark.parametrize('find', [logits_layer, feature_layer])
def test_a_network_whose_layer_is_not_known_is_an_error_that_names_what_there_is(find, make, message):
    with pytest.raises(ConfigError, match=message):
        find(make())


def test_auxiliary_heads():
    one = segmentors.pspnet()
    assert auxiliary_layer(models.build(one)) == 'auxiliary_head.conv_seg'
    several = segmentors.pspnet()
    several.auxiliary_head = [several.auxiliary_head, several.auxiliary_head]
    message = "has 2 auxiliary heads.*set auxiliary_layer .*'auxiliary_head.0.conv_seg' or 'auxiliary_head.1.conv_seg'"
    with pytest.raises(ConfigError, match=message):
        auxiliary_layer(models.build(several))
    with pytest.raises(ConfigError, match=r"has no auxiliary heads.*'auxiliary_head.conv_seg'"):
        auxiliary_layer(models.build(segmentors.segformer()))


def cascade(classes=19, **changes):
    return with_head([{**FCN, 'num_classes': classes}, {**OCR, 'num_classes': classes}], classes=classes, **changes)


def two_auxiliaries(classes=19):
    config = segmentors.pspnet(classes=classes)
    config.auxiliary_head = [config.auxiliary_head, config.auxiliary_head]
    return config


def binary(channels):
    head = dict(out_channels=channels, threshold=0.3 if channels == 1 else None, num_classes=2)
    head['loss_decode'] = dict(type='CrossEntropyLoss', use_sigmoid=channels == 1)
    return segmentors.pspnet(classes=2, decode_head=head)


CASCADED, LISTED = 'decode_head.1.conv_seg', 'auxiliary_head.0.conv_seg'


@pytest.mark.parametrize(
    ('student', 'teacher', 'layer'),
    [
        (cascade(19), cascade(7), CASCADED),
        (cascade(19), cascade(7), 'decode_head.0.conv_seg'),
        (two_auxiliaries(19), two_auxiliaries(7), LISTED),
        (binary(1), binary(2), 'decode_head.conv_seg'),
        (binary(2), binary(1), 'decode_head.conv_seg'),
    ],
    ids=['cascade', 'first of a cascade', 'list', '1 and 2', '2 and 1'],
)
@pytest.mark.parametrize('method', ['CWD', 'MGD', 'PKD', 'KD', 'DIST', 'SKD', 'DAKD'])
def test_logits_of_other_classes_are_refused_with_layers_that_exist(method, student, teacher, layer):
    if method == 'SKD' and layer.startswith('decode_head.0'):
        pytest.skip('SKD wants one map, and the first head of a cascade puts out two in a training step')
    student, teacher = models.build(student), models.build(teacher)
    options = dict(auxiliary_layer=layer) if method == 'DAKD' else {}
    with pytest.raises(ConfigError) as error:
        distill(student, teacher, dict(it=dict(type=method, layer=layer, **options)))
    message = str(error.value)
    assert 'of the teacher' in message
    assert '\n' not in message
    for name in [part for part in message.split("'") if 'conv_seg' in part]:
        assert all(isinstance(each.get_submodule(name), torch.nn.Conv2d) for each in (student, teacher)), name


def test_features_of_two_classes_by_one_channel_and_by_two_are_compared():
    """Where the numbers of channels happen to have that ratio too."""
    student, teacher = (
        models.build(binary(1)),
        models.build(binary(2) | segmentors.pspnet(32, 2, decode_head=dict(out_channels=2))),
    )
    distill(student, teacher, dict(ifvd=dict(type='IFVD')))
