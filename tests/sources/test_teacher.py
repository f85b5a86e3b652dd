import copy
import pickle
from pathlib import Path

import pytest
import torch
from mmengine.logging import HistoryBuffer

from mmkd.distillers import Distillers
from mmkd.errors import ConfigError
from mmkd.hosts.running import run
from mmkd.sources import Teacher, build_sources
from mmkd.taps import Taps
from mmkd.testing import detectors, models
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


def test_only_what_the_taps_need_runs(teacher_options):
    teacher = ready(teacher_options, ('backbone.layer2',))
    calls = []
    for name in ('backbone.layer3', 'neck', 'bbox_head'):
        teacher.model.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name))
    teacher(torch.randn(1, 3, 64, 64), None)
    assert calls == []


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
        ('text', 'is no checkpoint of PyTorch'),
        ('malicious', r'refused.*\((_io|io)\.open\)'),
        ('malicious pickle', 'is no checkpoint of PyTorch'),
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
        (dict(type='Average', momentum='0.9'), "momentum='0.9': expected a number"),
        (dict(type='Snapshot', cycle=0), 'cycle=0: expected a whole number of training steps'),
        (dict(type='Snapshot', cycle=1.5), 'cycle=1.5: expected a whole number'),
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
