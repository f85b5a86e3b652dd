"""Which levels belong together, and what is refused."""

import pytest
import torch

import mmkd
from mmkd.distillers import LevelPairs
from mmkd.errors import ConfigError
from mmkd.hosts.running import probe
from mmkd.taps import Taps
from mmkd.testing import detectors, models, segmentors
from mmkd.testing.batches import random_batch


def cascade(channels=16, classes=19):
    """A segmentor of two heads, of which mmseg calls the first one twice in training."""
    config = segmentors.pspnet(channels)
    first = dict(config['decode_head'], num_classes=classes, dropout_ratio=0.0)
    second = dict(first, type='OCRHead', ocr_channels=8)
    del second['pool_scales']
    return dict(config, type='CascadeEncoderDecoder', num_stages=2, decode_head=[first, second])


def batch(model, size=(64, 64)):
    data = random_batch(model, (2, 3, *size)) if not isinstance(model.decode_head, torch.nn.ModuleList) else None
    if data is None:
        plain = models.build(segmentors.pspnet())
        data = random_batch(plain, (2, 3, *size))
    return model.data_preprocessor(data, True)


@pytest.mark.parametrize('method', ['CWD', 'KD'])
def test_both_heads_of_a_cascade_are_distilled(method):
    layers = ['decode_head.0.conv_seg', 'decode_head.1.conv_seg']
    student, teacher = models.build(cascade(), seed=0), models.build(cascade(24), seed=1)
    model = mmkd.distill(student, teacher, dict(it=dict(type=method, layer=layers)))
    model.init_weights()
    loss = model.train()(**batch(model), mode='loss')['it.loss']
    for head in model.decode_head:
        (gradient,) = torch.autograd.grad(loss, head.conv_seg.weight, retain_graph=True)
        assert gradient.abs().sum() > 0


def taps(*sizes, images=1, channels=8):
    """Taps of one layer that puts out maps of these sizes."""

    class Layer(torch.nn.Module):
        def forward(self):
            return tuple(torch.rand(images, channels, size, size, requires_grad=True) for size in sizes)

    model = torch.nn.ModuleDict({'neck': Layer()})
    with Taps(model, ['neck'], images=1) as read:
        model['neck']()
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


@pytest.mark.parametrize(
    ('config', 'layer'),
    [
        (detectors.faster_rcnn(), 'roi_head.bbox_roi_extractor'),
    ],
)
@pytest.mark.parametrize('method', ['CWD', 'PKD', 'AT', 'MGD'])
def test_rows_that_are_no_images_are_refused(method, config, layer):
    student, teacher = models.build(config, seed=0), models.build(config, seed=1)
    with pytest.raises(ConfigError, match=f'{layer!r} of FasterRCNN puts out .* rows for 1 images .regions or queries'):
        mmkd.distill(student, teacher, dict(it=dict(type=method, layer=layer)))


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
