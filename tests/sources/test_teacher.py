import copy
import pickle
from pathlib import Path

import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.logging import HistoryBuffer

from mmkd.distill import distill
from mmkd.distillers import Distillers
from mmkd.errors import ConfigError
from mmkd.fold import fold_batch_norm
from mmkd.hosts.running import run
from mmkd.normalize import Renormalize
from mmkd.sources import Teacher, build_sources
from mmkd.taps import Taps
from mmkd.testing import detectors, models, segmentors
from mmkd.testing.batches import random_batch
from mmkd.weights import load_weights, read_checkpoint

LAYERS = ('backbone', 'neck', 'bbox_head')


def build_teacher(options) -> Teacher:
    return build_sources(options, None)['teacher']


def ready(options, layers=LAYERS):
    teacher = build_teacher(options)
    teacher.layers, teacher.calls = layers, dict.fromkeys(layers, 1)
    teacher.load()
    return teacher


def stock(options):
    model = models.build(options['config']).eval()
    model.load_state_dict(torch.load(options['checkpoint'], weights_only=True)['state_dict'])
    return model


def outputs(model, layers, images):
    with torch.no_grad(), Taps(model, layers) as taps:
        run(model, layers, images, None)
    return taps


def assert_close(taps, expected, atol):
    for layer in expected:
        for ours, theirs in zip(taps[layer], expected[layer]):
            for a, b in zip(*((each,) if isinstance(each, torch.Tensor) else each for each in (ours, theirs))):
                assert (a - b).abs().max() < atol


def test_its_outputs_equal_the_stock_models_in_eval_mode(teacher_options):
    images = torch.randn(2, 3, 96, 128)
    assert_close(ready(teacher_options)(images, None), outputs(stock(teacher_options), LAYERS, images), atol=1e-4)


def test_a_full_size_teacher_equals_stock_mmdet():
    """ResNet-50 with batch-norm statistics that are not the initial ones."""
    from mmengine.hub import get_config

    config = get_config('mmdet::retinanet/retinanet_r50_fpn_1x_coco.py').model
    config.backbone.init_cfg = None
    model = models.build(config, seed=0).eval()
    images = torch.randn(1, 3, 128, 160)
    expected = outputs(model, ('neck', 'bbox_head'), images)
    assert fold_batch_norm(model, ('neck', 'bbox_head')) == 53
    found = outputs(model, ('neck', 'bbox_head'), images)
    scale = max(float(level.abs().max()) for level in expected['neck'])
    assert_close(found, expected, atol=1e-4 * max(scale, 1))


def test_only_what_the_taps_need_runs(teacher_options):
    teacher = ready(teacher_options, ('backbone.layer2',))
    calls = []
    for name in ('backbone.layer3', 'neck', 'bbox_head'):
        teacher.model.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name))
    teacher(torch.randn(1, 3, 64, 64), None)
    assert calls == []


def test_a_batch_norm_is_folded_only_behind_its_own_convolution():
    class Odd(torch.nn.Module):
        """norm1 follows a ReLU; norm2 follows a convolution that is called twice; only norm3 can be folded."""

        def __init__(self):
            super().__init__()
            self.conv1, self.conv2, self.conv3 = (torch.nn.Conv2d(3, 3, 1) for _ in range(3))
            self.norm1, self.norm2, self.norm3 = (torch.nn.BatchNorm2d(3) for _ in range(3))

        def extract_feat(self, x):
            x = self.norm1(self.conv1(x).relu())
            x = self.norm2(self.conv2(x)) + self.conv2(x)
            self.neck(self.norm3(self.conv3(x)))

    model = Odd().eval()
    model.neck = torch.nn.Identity()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean)
    assert fold_batch_norm(model, ('neck',)) == 1
    assert isinstance(model.norm3, torch.nn.Identity)
    assert isinstance(model.norm1, torch.nn.BatchNorm2d)


def test_a_convolution_that_is_used_without_its_batch_norm_too_keeps_both():
    class Both(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.neck = torch.nn.Conv2d(3, 3, 1), torch.nn.BatchNorm2d(3), torch.nn.Identity()

        def extract_feat(self, x):
            x = self.conv(x)
            self.neck(self.norm(x) + x)

    model = Both().eval()
    torch.nn.init.constant_(model.norm.running_mean, 2.0)
    images = torch.randn(1, 3, 8, 8)
    expected = outputs(model, ('neck',), images)['neck'][0]
    assert fold_batch_norm(model, ('neck',)) == 0
    assert torch.equal(outputs(model, ('neck',), images)['neck'][0], expected)


def test_a_teacher_without_loaded_weights_does_not_run(teacher_options):
    with pytest.raises(ConfigError, match='not loaded yet; call init_weights'):
        build_teacher(teacher_options)(torch.randn(1, 3, 64, 64), None)


def test_a_tapped_convolution_keeps_its_own_output(teacher_options):
    layer = 'backbone.layer1.0.conv2'
    images = torch.randn(1, 3, 64, 64)
    assert_close(
        ready(teacher_options, (layer,))(images, None), outputs(stock(teacher_options), (layer,), images), 1e-4
    )


def test_it_needs_no_gradient_and_stays_in_eval_mode(teacher_options):
    teacher = ready(teacher_options)
    taps = teacher(torch.randn(1, 3, 64, 64), None)
    assert not taps['neck'][0].requires_grad
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    assert not any(module.training for module in teacher.model.modules())


def test_a_copy_is_the_same_teacher(teacher_options):
    teacher = build_teacher(teacher_options)
    assert copy.deepcopy(teacher) is teacher


def test_autocast_of_its_own(teacher_options):
    teacher = ready(dict(teacher_options, dtype='bfloat16'))
    images = torch.randn(1, 3, 64, 64)
    found, expected = teacher(images, None), outputs(stock(teacher_options), LAYERS, images)
    difference = (found['neck'][0] - expected['neck'][0]).abs().max() / expected['neck'][0].abs().max()
    assert 1e-5 < difference < 0.05
    with pytest.raises(ConfigError, match="dtype='int8'"):
        build_teacher(dict(teacher_options, dtype='int8'))


# --- normalisation


def preprocess(config, image):
    model = models.build(detectors.retinanet(data_preprocessor=config))
    data = {'inputs': [image], 'data_samples': [DetDataSample(metainfo=dict(img_shape=tuple(image.shape[1:])))]}
    batch = model.data_preprocessor(data)
    return model.data_preprocessor, batch['inputs'], batch['data_samples']


@pytest.mark.parametrize(
    'teachers',
    [
        dict(mean=[103.53, 116.28, 123.675], std=[1.0, 1.0, 1.0], bgr_to_rgb=False),
        dict(mean=[0.0, 0.0, 0.0], std=[255.0, 255.0, 255.0], bgr_to_rgb=True),
        dict(mean=None, std=None, bgr_to_rgb=False),
    ],
)
def test_a_batch_is_renormalized_as_the_teacher_would_have_done(teachers):
    image = torch.randint(0, 256, (3, 50, 70), dtype=torch.uint8)
    source, inputs, data_samples = preprocess({}, image)
    target, expected, _ = preprocess(teachers, image)
    renormalised = Renormalize.between(source, target)(inputs, data_samples)
    assert renormalised.shape[2:] == (64, 96)
    torch.testing.assert_close(renormalised, expected, rtol=1e-5, atol=1e-3)
    assert (renormalised[:, :, 50:] == 0).all()
    assert (renormalised[:, :, :, 70:] == 0).all()


def test_equal_normalisation_costs_nothing():
    source, _, _ = preprocess({}, torch.zeros(3, 32, 32, dtype=torch.uint8))
    assert Renormalize.between(source, source) is None


@pytest.mark.parametrize(
    'padding', [dict(size=(96, 128), size_divisor=None), dict(size_divisor=32)], ids=['size', 'divisor']
)
@pytest.mark.parametrize(
    'teachers',
    [
        dict(mean=[103.53, 116.28, 123.675], std=[1.0, 1.0, 1.0], bgr_to_rgb=False),
        dict(mean=[127.5] * 3, std=[127.5] * 3, pad_val=0.5),
        dict(pad_val=-2.0),
        dict(mean=None, std=None, bgr_to_rgb=False),
    ],
)
def test_a_segmentor_with_its_own_normalisation_sees_what_it_would_have_made_itself(teachers, padding, tmp_path):
    """For a batch of two image sizes, padded."""
    teacher = segmentors.pspnet(24, data_preprocessor=dict(teachers, **padding))
    options = dict(config=teacher, checkpoint=models.save_weights(teacher, tmp_path / 'teacher.pth'))
    student = models.build(segmentors.pspnet(data_preprocessor=dict(pad_val=1.0, **padding)), seed=0)
    layer = 'decode_head.conv_seg'
    model = distill(student, options, dict(kd=dict(type='KD')))
    model.sources['teacher'].load()

    def batch():
        parts = [random_batch(model, (1, 3, *size), seed=seed) for seed, size in enumerate([(50, 120), (90, 70)])]
        return {key: parts[0][key] + parts[1][key] for key in parts[0]}

    own = stock(options)
    images = own.data_preprocessor(batch(), True)['inputs']
    assert images.shape == (2, 3, 96, 128)
    (expected,) = outputs(own, (layer,), images)[layer]
    data = model.data_preprocessor(batch(), True)
    given = data['inputs'].clone()
    (found,) = model.sources['teacher'](data['inputs'], data['data_samples'])[layer]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    assert torch.equal(data['inputs'], given)  # the student's own images stay as they are


# --- weights


def test_a_training_checkpoint_with_histories_loads(teacher_options, tmp_path):
    weights = torch.load(teacher_options['checkpoint'], weights_only=True)['state_dict']
    history = HistoryBuffer()
    history.update(0.5)
    path = tmp_path / 'epoch_1.pth'
    torch.save({'state_dict': weights, 'message_hub': {'log_scalars': {'train/loss': history}}}, path)
    assert read_checkpoint(path).keys() == weights.keys()


def test_module_versions_are_kept(teacher_options):
    model = models.build(teacher_options['config'])
    weights = read_checkpoint(Path(teacher_options['checkpoint']))
    assert weights._metadata == model.state_dict()._metadata
    assert weights._metadata['backbone.bn1'] == {'version': 2}


def test_a_teacher_that_was_distilled_itself(teacher_options, tmp_path):
    weights = torch.load(teacher_options['checkpoint'], weights_only=True)['state_dict']
    path = tmp_path / 'distilled.pth'
    torch.save({'state_dict': {**weights, 'distillers.cwd.adapters.0.conv.weight': torch.zeros(1)}}, path)
    config = dict(type='mmkd.Distill', student=teacher_options['config'], teacher='unused', distillers={})
    teacher = ready(dict(config=config, checkpoint=str(path)))
    assert type(teacher.model).__name__ == 'RetinaNet'


class Malicious:
    def __reduce__(self):
        return (open, ('executed', 'w'))


def damaged(kind, options, tmp_path):
    path = tmp_path / f'{kind}.pth'
    if kind == 'missing':
        return path
    if kind == 'truncated':
        content = open(options['checkpoint'], 'rb').read()
        path.write_bytes(content[: len(content) // 2])
    elif kind == 'empty':
        path.write_bytes(b'')
    elif kind == 'text':
        path.write_text('version https://git-lfs.github.com/spec/v1')
    elif kind == 'malicious':
        torch.save({'state_dict': Malicious()}, path)
    elif kind == 'malicious pickle':
        path.write_bytes(pickle.dumps({'state_dict': Malicious()}))
    elif kind == 'no weights':
        torch.save({'optimizer': {'lr': 0.1}}, path)
    elif kind == 'other architecture':
        models.save_weights(detectors.retinanet(channels=16, base=12, bbox_head=dict(stacked_convs=2)), path)
    return path


@pytest.mark.parametrize(
    ('kind', 'message'),
    [
        ('missing', 'no such file'),
        ('truncated', 'cannot be read, it may be truncated'),
        ('empty', 'truncated'),
        ('text', 'refused|truncated'),
        ('malicious', r'refused.*GLOBAL (_io|io)\.open'),
        ('malicious pickle', r'refused'),
        ('no weights', 'holds no weights'),
        (
            'other architecture',
            r'does not fit RetinaNet: 4 unexpected \(bbox_head.cls_convs.1.conv.weight, .*of another shape '
            r'\(neck.lateral_convs.0.conv.weight \(16, 24, 1, 1\) instead of \(24, 24, 1, 1\)',
        ),
    ],
)
def test_a_checkpoint_that_cannot_be_used_is_one_clear_line(kind, message, teacher_options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = damaged(kind, teacher_options, tmp_path)
    with pytest.raises(ConfigError, match=message) as error:
        load_weights(models.build(teacher_options['config']), str(path))
    assert str(path) in str(error.value)
    assert '\n' not in str(error.value)
    assert not (tmp_path / 'executed').exists()


def test_a_teacher_without_weights_is_an_error(teacher_options):
    teacher = build_teacher(dict(config=teacher_options['config']))
    with pytest.raises(ConfigError, match='no checkpoint for RetinaNet.*a teacher needs trained weights'):
        teacher.load()


@pytest.mark.parametrize(
    ('teacher', 'message'),
    [
        ('mmdet::retinanet/no_such_config.py', 'mmdet has no such config'),
        ('mmkd::gid_retinane.py', "nearest are 'gid_retinanet.py'"),
        ('nowhere/teacher.py', 'no such file'),
        ('nopackage::teacher/x.py', "'nopackage' is not installed"),
        (dict(checkpoint='x.pth'), 'teacher: Teacher needs config'),
        (dict(config='x.py', checkpiont='x.pth'), "no option 'checkpiont'; the nearest are 'checkpoint'"),
        (3, "expected a config's name, a dict with config, a built model"),
        ({}, "expected a config's name"),
        (dict(type='Techer', config='x.py'), "no source 'Techer'; the nearest are 'Teacher'"),
        (dict(type='Average', momentum=1), 'momentum=1: expected a number'),
        (dict(type='Average', interval=0), 'interval=0: expected a whole number of at least 1'),
        (dict(type='Average', begin=5, end=5), 'end=5: expected a whole number of at least 6'),
        (dict(loss=dict(config='x.py')), "teacher.loss: a name .* must not contain 'loss'"),
    ],
)
def test_a_teacher_that_cannot_be_found_is_an_error(teacher, message):
    with pytest.raises(ConfigError, match=message):
        build_teacher(teacher)


def test_a_name_brings_the_weights_of_its_metafile():
    teacher = build_teacher('mmdet::retinanet/retinanet_r50_fpn_1x_coco.py')
    assert teacher.checkpoint.endswith('/retinanet_r50_fpn_1x_coco_20200130-c2398f9e.pth')


def test_a_download_that_fails_says_where_the_file_goes(tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    with pytest.raises(ConfigError, match=r'could not be downloaded.*put the file at .*/checkpoints/w.pth.*make demo'):
        load_weights(torch.nn.Conv2d(1, 1, 1), 'http://127.0.0.1:9/w.pth')


def test_layers_are_the_union_over_distillers(teacher_options):
    collection = Distillers(dict(a=dict(type='CWD', layer='neck'), b=dict(type='GID')))
    assert collection.layers('teacher_layers') == ('neck', 'bbox_head')
