"""Which levels belong together, and what is refused."""

import pytest
import torch

import mmkd
from mmkd.distillers import LevelPairs
from mmkd.distillers.levels import maps, match_levels
from mmkd.errors import ConfigError
from mmkd.hosts.running import probe
from mmkd.taps import Taps
from mmkd.testing import detectors, models, segmentors
from mmkd.testing.stock import small_config

# --- which levels belong together


def levels(*sizes):
    return [torch.zeros(1, 1, size, size) for size in sizes]


@pytest.mark.parametrize(
    ('student', 'teacher', 'pairs'),
    [
        ((32, 16, 8, 4, 2), (32, 16, 8, 4, 2), [(0, 0), (1, 1), (2, 2), (3, 3), (4, 4)]),
        ((32, 16, 8, 4, 2), (64, 32, 16, 8, 4), [(0, 1), (1, 2), (2, 3), (3, 4)]),
        ((16,), (32, 16, 8), [(0, 1)]),
        ((8, 8, 4), (8, 8, 8), [(0, 0), (1, 1)]),
        ((16,), (32,), [(0, 0)]),  # two single levels belong together: the adapter resizes
    ],
)
def test_levels_of_one_stride_belong_together(student, teacher, pairs):
    assert match_levels(levels(*student), levels(*teacher), 'stride', ('a', 'b')) == pairs


def test_levels_by_index():
    found = match_levels(levels(32, 16), levels(64, 32), 'index', ('a', 'b'))
    assert found == [(0, 0), (1, 1)]


@pytest.mark.parametrize(
    ('match', 'student', 'teacher', 'message'),
    [('stride', (32, 16), (8, 4), 'no level of the same stride'), ('index', (32, 16), (32,), 'have 2 and 1 levels')],
)
def test_levels_that_do_not_belong_together_are_errors(match, student, teacher, message):
    with pytest.raises(ConfigError, match=message):
        match_levels(levels(*student), levels(*teacher), match, ('a', 'b'))


# --- pairs


def taps(*sizes, channels=8):
    """Taps of ``neck``, which puts out maps of these sizes; or of several layers, in a dict."""
    layers = sizes[0] if isinstance(sizes[0], dict) else dict(neck=sizes)

    class Layer(torch.nn.Module):
        def forward(self, sizes):
            return tuple(torch.rand(1, channels, size, size, requires_grad=True) for size in sizes)

    model = torch.nn.ModuleDict({name: Layer() for name in layers})
    with Taps(model, layers, images=1) as read:
        for name, of_layer in layers.items():
            model[name](of_layer)
    return read


def test_pairs_know_their_levels_and_say_what_was_paired():
    levels = LevelPairs('neck')
    levels.setup(taps(32, 16, 8), taps(16, 8, 4, channels=6))
    assert levels.pairs == [(0, 1, 0), (0, 2, 1)]
    assert levels.describe() == (
        'levels 1 2 of 3 of neck with levels 0 1 of 3 of neck: (C, H, W) of (8, 16, 16) (8, 8, 8), 2 adapters (ConvAdapter)'
    )
    pairs = levels(taps(64, 32, 16), taps(32, 16, 8, channels=6))
    assert [(each.student_level, each.teacher_level) for each in pairs] == [(1, 0), (2, 1)]
    assert all(each.student.shape == each.teacher.shape for each in pairs)


@pytest.mark.parametrize('whose', ['student', 'teacher'])
def test_another_number_of_maps_than_probed_is_an_error(whose):
    levels = LevelPairs('neck')
    levels.setup(taps(16, 8), taps(16, 8))
    both = [taps(16, 8), taps(16, 8)]
    both[whose == 'teacher'] = taps(16, 8, 4)
    with pytest.raises(ConfigError, match=f"{whose} layer 'neck' puts out 3 maps in training and 2 when probed"):
        levels(*both)


def test_what_was_paired_of_several_layers():
    """Those that are called once are named alone; a map of another size is resized."""
    levels = LevelPairs(['a', 'b'], ['a', 'c'])
    student, teacher = taps(dict(a=(16,), b=(32, 16))), taps(dict(a=(8,), c=(16,)))
    levels.setup(student, teacher)
    assert levels.pairs == [(0, 0, 0), (1, 1, 0)]
    assert levels.describe() == (
        'a with a; levels 1 of 2 of b with levels 0 of 1 of c: (C, H, W) of (8, 16, 16) (8, 16, 16), no adapter, 1 resized'
    )
    assert [tuple(pair.student.shape) for pair in levels(student, teacher)] == [(1, 8, 8, 8), (1, 8, 16, 16)]


def taps_of(output):
    model = torch.nn.ModuleDict(dict(embed=torch.nn.Identity()))
    with Taps(model, ['embed'], images=2) as read:
        model['embed'](output)
    return read


def test_tokens_with_their_size_are_a_map():
    """As mmseg's patch embeddings put them out."""
    tokens = torch.rand(2, 12, 5, dtype=torch.bfloat16)
    (level,) = maps(taps_of((tokens, (3, 4))), 'embed')
    assert level.shape == (2, 5, 3, 4)
    assert torch.equal(level.permute(0, 2, 3, 1).reshape(2, 12, 5), tokens.float())


@pytest.mark.parametrize('size', [(3, 5), (12,), None, [2, 2, 3]])
def test_other_outputs_beside_tokens_are_an_error(size):
    with pytest.raises(ConfigError, match="layer 'embed' puts out a .* of several outputs, not a map"):
        maps(taps_of((torch.rand(2, 12, 5), size)), 'embed')


def test_nothing_is_said_before_the_setup():
    with pytest.raises(ConfigError, match='its setup has to be called'):
        LevelPairs('neck').describe()


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(layer='neck', match='size'), "match='size': expected 'stride' or 'index'"),
        (dict(layer=''), "layer='': expected a layer's name"),
        (dict(layer=[]), r"layer=\[\]: expected a layer's name"),
        (dict(layer=['neck', 3]), "layer=.*3.*: expected a layer's name, such as 'neck', or a list of names"),
        (dict(layer='neck', teacher_layer=dict()), "teacher_layer={}: expected a layer's name"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        LevelPairs(**options)


def test_as_many_layers_of_both_networks_are_needed():
    with pytest.raises(ConfigError, match='2 student and 1 teacher layers, a, b and c; name as many'):
        LevelPairs(['a', 'b'], 'c').setup(taps(dict(a=(8,), b=(8,))), taps(dict(c=(8,))))


def test_a_student_without_gradient_is_an_error():
    levels = LevelPairs('neck')
    levels.setup(taps(8), taps(8))
    with pytest.raises(ConfigError, match="student layer 'neck': its output has no gradient.*is it frozen"):
        levels(taps(8).detach(), taps(8))


# --- layers of which nothing is learnt


def refused(config, layer, message, teacher=None, method='CWD'):
    student, teacher = models.build(config, seed=0), models.build(teacher or config, seed=1)
    with pytest.raises(ConfigError, match=message) as error:
        mmkd.distill(student, teacher, dict(it=dict(type=method, layer=layer)))
    assert '\n' not in str(error.value)


def mask_rcnn():
    mask_head = dict(
        type='FCNMaskHead',
        num_convs=1,
        in_channels=16,
        conv_out_channels=16,
        num_classes=3,
        loss_mask=dict(type='CrossEntropyLoss', use_mask=True),
    )
    extractor = dict(detectors.faster_rcnn().roi_head.bbox_roi_extractor)
    test_cfg = dict(rcnn=dict(mask_thr_binary=0.5))
    return detectors.faster_rcnn(
        type='MaskRCNN', roi_head=dict(mask_head=mask_head, mask_roi_extractor=extractor), test_cfg=test_cfg
    )


@pytest.mark.parametrize('method', ['CWD', 'PKD', 'AT', 'MGD'])
def test_rows_that_are_regions_are_refused(method):
    layer = 'roi_head.bbox_roi_extractor'
    message = f'{layer!r} of FasterRCNN puts out .* rows for 1 images .regions or queries'
    refused(detectors.faster_rcnn(), layer, message, method=method)


@pytest.mark.parametrize(
    ('config', 'layer', 'message'),
    [
        (mask_rcnn, 'roi_head.mask_head.conv_logits', r'MaskRCNN puts out \d+ rows for 1 images'),
        (mask_rcnn, 'roi_head.bbox_head.fc_cls', r'expected \(B, C, H, W\) maps'),
        (mask_rcnn, 'roi_head.bbox_head', r'expected \(B, C, H, W\) maps'),
        (detectors.retinanet, 'bbox_head', 'puts out a tuple of several outputs, not a map; name the module'),
        (
            lambda: small_config('mmdet/detr/detr_r50_8xb2-150e_coco.py'),
            'bbox_head.fc_cls',
            'DETR puts out 2 rows for 1',
        ),
    ],
)
def test_other_outputs_that_are_no_maps_of_images_are_refused(config, layer, message):
    refused(config(), layer, message)


# --- classes


def auxiliary_heads(classes):
    config = segmentors.pspnet(classes=classes)
    config.auxiliary_head = [config.auxiliary_head, dict(config.auxiliary_head)]
    return config


@pytest.mark.parametrize(
    ('config', 'layer'),
    [
        (lambda classes: segmentors.pspnet(classes=classes), 'decode_head.conv_seg'),
        (lambda classes: segmentors.cascade(classes=classes), 'decode_head.1.conv_seg'),
        (auxiliary_heads, 'auxiliary_head.1.conv_seg'),
        (lambda classes: detectors.retinanet(classes=classes), 'bbox_head.retina_cls'),
    ],
)
def test_logits_of_other_classes_are_refused(config, layer):
    """Of one head, of one of a cascade, of one of a list; the layer before is compared."""
    refused(config(19), layer, f'{layer!r} puts out logits of 19 classes, .* of the teacher of 7', teacher=config(7))
    before = layer + ':input'
    mmkd.distill(models.build(config(19)), models.build(config(7)), dict(it=dict(type='CWD', layer=before)))


def test_logits_of_one_channel_and_of_two_are_refused():
    config = segmentors.pspnet(classes=2)
    one = segmentors.pspnet(classes=2, decode_head=dict(out_channels=1, threshold=0.5))
    one.decode_head.loss_decode = dict(type='CrossEntropyLoss', use_sigmoid=True)
    refused(one, 'decode_head.conv_seg', 'puts out 1 channels for 2 classes, .* of the teacher 2', teacher=config)


def test_the_input_of_a_layer_is_compared_as_its_output(teacher_options):
    """Of one that is called once, of one that a head shares between levels, and of the backbone, the image."""
    student = models.build(detectors.retinanet(), seed=0)
    entries = {
        name: dict(type='AT', layer=layer)
        for name, layer in dict(backbone='neck:input', tower='bbox_head.retina_cls:input').items()
    }
    model = mmkd.distill(student, teacher_options, entries)
    levels = {name: each.levels.pairs for name, each in model.distillers.items()}
    assert [len(each) for each in levels.values()] == [4, 3]
    (image,) = probe(student, ['backbone:input'])['backbone:input']
    assert image.shape == (1, 3, 256, 256)
