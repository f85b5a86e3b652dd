"""tools/export.py: what stock mmdet, mmseg and onnxruntime make of a student, in a process that cannot import mmkd."""

import subprocess
import sys
from pathlib import Path

import cv2
import mmdet
import numpy as np
import pytest
import torch
from mmcv.ops import batched_nms
from mmengine.config import Config
from mmengine.registry import MODELS
from mmengine.runner import Runner
from tool import tool

from mmkd.commands import export as command
from mmkd.errors import ConfigError
from mmkd.hosts import deploy
from mmkd.hosts.plain import plain_config
from mmkd.testing import detectors, models, segmentors
from mmkd.testing.runs import distilled, of_all_sources, shapes_config, streets_config

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
WITHOUT_MMKD = """
import sys
class NoMmkd:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] == 'mmkd':
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, NoMmkd())
"""


def stock(script):
    """Run a script where mmkd cannot be imported; what it printed."""
    done = subprocess.run([sys.executable, '-c', WITHOUT_MMKD + script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def export(config, tmp_path, *options):
    """Train for an iteration, and export; the exported config."""
    config.train_cfg.max_iters = 1
    config.default_hooks.checkpoint.interval = 1
    config.dump(tmp_path / 'config.py')
    Runner.from_cfg(config).train()
    tool('export', tmp_path / 'config.py', tmp_path / 'work' / 'iter_1.pth', tmp_path / 'plain', *options)
    text = (tmp_path / 'plain.py').read_text()
    assert 'mmkd' not in text
    assert 'distillers' not in text
    return Config.fromfile(tmp_path / 'plain.py')


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / 'picture.png'
    cv2.imwrite(str(path), np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8))
    return str(path)


@pytest.mark.long
def test_stock_mmdet_shows_the_datas_own_classes(tmp_path, picture):
    config = shapes_config(tmp_path, distilled(tmp_path, dict(gid=dict(type='GID'))))
    names = config.train_dataloader.dataset.metainfo.classes
    config.optim_wrapper.paramwise_cfg = dict(
        custom_keys={'gid.adapters': dict(lr_mult=2), 'backbone': dict(lr_mult=0.1)}
    )
    plain = export(config, tmp_path, '--onnx', '--torch-export', '--check')
    assert plain.optim_wrapper.paramwise_cfg == dict(custom_keys=dict(backbone=dict(lr_mult=0.1)))
    stock(f"""
from mmdet.apis import DetInferencer, init_detector, inference_detector
config, weights, picture = {str(tmp_path / 'plain.py')!r}, {str(tmp_path / 'plain.pth')!r}, {picture!r}
names = {tuple(names)!r}
model = init_detector(config, weights, device='cpu')
assert tuple(model.dataset_meta['classes']) == names
assert type(model).__name__ == 'RetinaNet'
inference_detector(model, picture)
inferencer = DetInferencer(config, weights, device='cpu')
assert tuple(inferencer.visualizer.dataset_meta['classes']) == names
inferencer(picture, out_dir={str(tmp_path / 'drawn')!r}, pred_score_thr=0.0)
""")
    assert list((tmp_path / 'drawn').rglob('picture.png'))
    stock(f"""
import json, cv2, numpy as np, onnxruntime, torch
image = cv2.imread({picture!r})
session = onnxruntime.InferenceSession({str(tmp_path / 'plain.onnx')!r})
said = session.get_modelmeta().custom_metadata_map
assert json.loads(said['classes']) == list({tuple(names)!r}) and said['channels'] == 'RGB'
image = (image[..., ::-1] - np.array(json.loads(said['mean']))) / np.array(json.loads(said['std']))
image = image.transpose(2, 0, 1)[None].astype(np.float32)
boxes, scores = session.run(['boxes', 'scores'], dict(image=image))
program = torch.export.load({str(tmp_path / 'plain.pt2')!r}).module()
traced = dict(zip([each.name for each in session.get_outputs()], program(torch.tensor(image))))
assert boxes.shape[-1] == 4 and boxes.min() >= 0 and boxes.max() <= 96
np.testing.assert_allclose(boxes, traced['boxes'].detach().numpy(), atol=1e-2)
np.testing.assert_allclose(scores, traced['scores'].detach().numpy(), atol=1e-4)
""")


def test_stock_mmdets_own_test_tool_gives_the_students_ap(tmp_path):
    config = shapes_config(tmp_path, distilled(tmp_path, dict(gid=dict(type='GID'))))
    plain = export(config, tmp_path)
    assert 'work_dir' not in plain
    script = next(Path(mmdet.__file__).parent.glob('.mim/tools/test.py'))
    arguments = [
        'test.py',
        str(tmp_path / 'plain.py'),
        str(tmp_path / 'plain.pth'),
        '--work-dir',
        str(tmp_path / 'stock'),
    ]
    printed = stock(f"""
import runpy
sys.argv = {arguments!r}
runpy.run_path({str(script)!r}, run_name='__main__')
""")
    own = tool('test', tmp_path / 'config.py', tmp_path / 'work' / 'iter_1.pth')
    found, wanted = (
        [line.partition('coco/bbox_mAP: ')[2].split()[0] for line in text.splitlines() if 'coco/bbox_mAP: ' in line]
        for text in (printed, own)
    )
    assert found == wanted
    assert len(found) == 1


@pytest.mark.long
def test_stock_mmseg_shows_the_datas_own_classes_and_trains_on_its_labelled_domain(tmp_path, picture):
    student = segmentors.pspnet(classes=3)
    model = distilled(
        tmp_path, dict(dakd=dict(type='DAKD', critic_channels=4)), student, segmentors.pspnet(classes=3, channels=24)
    )
    config = streets_config(tmp_path, model, two_domains=True)
    names, colors = ('road', 'sidewalk', 'building'), [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    loaders = [config.val_dataloader, config.test_dataloader]
    for dataset in (*config.train_dataloader.dataset.datasets, *(loader.dataset for loader in loaders)):
        dataset.metainfo = dict(classes=names, palette=colors)
    config.visualizer = dict(type='SegLocalVisualizer', name='visualizer', vis_backends=[dict(type='LocalVisBackend')])
    config.optim_wrapper.paramwise_cfg = dict(custom_keys={'dakd.critics': dict(lr_mult=0.1)})
    config.test_pipeline = config.test_dataloader.dataset.pipeline  # which mmseg's inference_model reads
    config.target = config.train_dataloader.dataset.datasets[1]  # a variable, as configs have them
    plain = export(config, tmp_path)
    assert 'paramwise_cfg' not in plain.optim_wrapper
    assert plain.train_dataloader.sampler == dict(type='InfiniteSampler', shuffle=True)
    assert plain.train_dataloader.dataset.data_prefix == config.train_dataloader.dataset.datasets[0].data_prefix
    assert 'domain' not in plain.train_dataloader.dataset.pipeline[-1].meta_keys
    stock(f"""
import torch
from mmengine.config import Config
from mmengine.runner import Runner
from mmseg.apis import MMSegInferencer, inference_model, init_model
config, weights, picture = {str(tmp_path / 'plain.py')!r}, {str(tmp_path / 'plain.pth')!r}, {picture!r}
names, colors = {names!r}, {colors!r}
model = init_model(config, weights, device='cpu')
assert tuple(model.dataset_meta['classes']) == names and model.dataset_meta['palette'] == colors
inference_model(model, picture)
inferencer = MMSegInferencer(config, weights, classes=model.dataset_meta['classes'],
                             palette=model.dataset_meta['palette'], device='cpu')
assert tuple(inferencer.model.dataset_meta['classes']) == names
assert tuple(inferencer.visualizer.dataset_meta['classes']) == names
inferencer(picture, out_dir={str(tmp_path / 'drawn')!r})
settings = Config.fromfile(config)
settings.work_dir = {str(tmp_path / 'stock')!r}
runner = Runner.from_cfg(settings)
runner.train()
assert runner.iter == 1
""")
    assert list((tmp_path / 'drawn').rglob('*.png'))


def test_names_and_colors_come_from_the_config_where_the_checkpoint_has_weights_alone(tmp_path):
    config = shapes_config(tmp_path, distilled(tmp_path, dict(gid=dict(type='GID'))))
    config.dump(tmp_path / 'config.py')
    models.save_weights(config.model.student, tmp_path / 'weights.pth')
    tool('export', tmp_path / 'config.py', tmp_path / 'weights.pth', tmp_path / 'plain')
    meta = torch.load(tmp_path / 'plain.pth', weights_only=True)['meta']['dataset_meta']
    assert meta['classes'] == tuple(config.train_dataloader.dataset.metainfo.classes)


def test_a_missing_checkpoint_is_not_called_a_teachers(tmp_path):
    config = shapes_config(tmp_path, distilled(tmp_path, dict(gid=dict(type='GID'))))
    config.dump(tmp_path / 'config.py')
    printed = tool('export', tmp_path / 'config.py', tmp_path / 'nowhere.pth', tmp_path / 'plain', expect=1)
    (line,) = [line for line in printed.splitlines() if line.startswith('error: ')]
    assert line.startswith(f'error: checkpoint {tmp_path}/nowhere.pth: no such file')
    assert 'teacher' not in line


MODULE = """
from mmengine.registry import HOOKS
from mmengine.hooks import Hook
from mmkd.registry import DISTILLERS

"""
DISTILLER = '@DISTILLERS.register_module()\nclass {name}Distiller:\n    pass\n'
HOOK = '@HOOKS.register_module()\nclass {name}Hook(Hook):\n    pass\n'


@pytest.mark.parametrize(
    ('parts', 'hooked', 'kept'),
    [
        (DISTILLER, False, False),  # only distillers need it
        (DISTILLER + HOOK, False, False),
        (DISTILLER + HOOK, True, True),  # the plain config names its hook
        (HOOK, False, True),  # nothing to do with distillation
        ('', False, True),
    ],
)
def test_imports_that_only_distillers_need_are_left_out(tmp_path, monkeypatch, parts, hooked, kept):
    name = f'imported{abs(hash((parts, hooked)))}'
    (tmp_path / f'{name}.py').write_text(MODULE + parts.format(name=name.title()))
    monkeypatch.syspath_prepend(tmp_path)
    config = shapes_config(tmp_path, distilled(tmp_path, dict(gid=dict(type='GID'))))
    config.custom_imports = dict(imports=[name, 'mmkd', 'json'])
    config.custom_hooks = [dict(type=f'{name.title()}Hook')] if hooked else []
    __import__(name)
    plain, left = plain_config(config, [])
    assert plain.custom_imports.imports == ([name, 'json'] if kept else ['json'])
    assert left == []
    assert config.custom_imports.imports == [name, 'mmkd', 'json']


@pytest.mark.parametrize(
    'name', ['gid_retinanet.py', 'skd_pspnet.py', 'ifvd_pspnet.py', 'dakd_deeplabv3.py', 'streets/dakd_pspnet.py']
)
def test_configs_become_plain(name):
    """Those that train critics, or on two domains."""
    plain, left = plain_config(Config.fromfile(ROOT / 'configs' / name), ['backbone.conv1.weight'])
    assert left == []
    assert 'teacher' not in plain.model
    for word in ('mmkd', 'distillers', 'critic'):
        assert word not in plain.pretty_text


SEGMENTORS = {
    'PSPNet': segmentors.pspnet(classes=3),
    'DeepLabV3': segmentors.deeplabv3(classes=3),
}
DETECTORS = {
    'RetinaNet': detectors.retinanet(),
    'GFL': detectors.gfl(),
    'FCOS': detectors.fcos(),
    'ATSS': detectors.atss(),
}
RTOL = 1e-4  # of an output's largest value


def written(config, path, size=(64, 96), exported=True):
    """The model, and what its ONNX file makes of three images, which it has not been compared on: images, outputs by name.

    Without ``exported`` it is what was to be exported, which takes less time.
    """
    onnxruntime = pytest.importorskip('onnxruntime')
    model = models.build(config, seed=0).eval()
    graph, images = deploy.Deployed(model, size), torch.randn(3, 3, *size)
    if not exported:
        return model, images, dict(zip(graph.outputs, graph(images), strict=True))
    said = deploy.write('onnx', graph, path, deploy.check_images(size, None))
    assert 'one image at a time' not in said
    session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    outputs = session.run(graph.outputs, {'image': images.numpy()})
    return model, images, dict(zip(graph.outputs, map(torch.tensor, outputs), strict=True))


def assert_close(found, wanted):
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= RTOL * wanted.abs().max()


@pytest.mark.parametrize('name', SEGMENTORS)
@torch.no_grad()
def test_onnx_gives_a_segmentors_logits_of_the_whole_image(name, tmp_path):
    model, images, outputs = written(SEGMENTORS[name], tmp_path / 'model.onnx')
    assert list(outputs) == ['logits']
    meta = [dict(img_shape=(64, 96), ori_shape=(64, 96), pad_shape=(64, 96), padding_size=[0] * 4)] * 3
    assert_close(outputs['logits'], model.inference(images, meta))
    assert [each.name for each in tmp_path.iterdir()] == ['model.onnx']  # weights in it


@pytest.mark.parametrize('name', DETECTORS)
@torch.no_grad()
def test_onnx_gives_a_detectors_maps_and_boxes_whose_nms_is_mmdets_prediction(name, tmp_path):
    model, images, outputs = written(DETECTORS[name], tmp_path / 'model.onnx', exported=name in ('RetinaNet', 'GFL'))
    maps = [each for levels in model(images, mode='tensor') for each in levels]
    assert len(outputs) == len(maps) + 2
    assert list(outputs)[3] == 'bbox_pred_0'
    assert ('centerness_2' in outputs) == (name in ('FCOS', 'ATSS'))
    for output, wanted in zip(outputs.values(), maps):
        assert_close(output, wanted)
    for index in range(3):
        sample = deploy._samples(images[:1])
        wanted = model.predict(images[index : index + 1], sample, rescale=False)[0].pred_instances
        boxes, scores = outputs['boxes'][index], outputs['scores'][index]
        areas = (boxes[:, 2:] - boxes[:, :2]).prod(-1, keepdim=True)  # mmdet drops boxes without any
        priors, labels = (scores * (areas > 0) > 0).nonzero(as_tuple=True)
        kept, order = batched_nms(boxes[priors], scores[priors, labels], labels, dict(type='nms', iou_threshold=0.5))
        kept, labels = kept[:50], labels[order[:50]]
        assert len(wanted) > 1
        assert_close(kept[:, 4], wanted.scores)
        assert (
            labels == wanted.labels
        ).float().mean() > 0.9  # scores that are equal but for rounding may change places
        same = labels == wanted.labels
        assert (kept[same, :4] - wanted.bboxes[same]).abs().max(-1).values.median() < 1e-2


def test_two_stages_are_one_line_that_names_mmdeploy():
    model = models.build(detectors.faster_rcnn(), seed=0)
    with pytest.raises(ConfigError, match='^--onnx: FasterRCNN has a second stage, .*mmdeploy') as error:
        deploy.Deployed(model, (64, 64))
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('config', [segmentors.pspnet(), detectors.retinanet(), detectors.faster_rcnn()])
def test_a_pair_with_other_weights_is_noticed(config):
    model, same, other = (models.build(config, seed=seed).eval() for seed in (0, 0, 1))
    images = deploy.check_images((64, 64), torch.zeros(1, 3, 70, 50))
    assert images['a validation image'].shape == (1, 3, 64, 64)
    assert 'largest difference 0.0e+00' in deploy.compare_models(model, same, images)
    with pytest.raises(ConfigError, match='^output .* of a random image (differs by|has the shape)'):
        deploy.compare_models(model, other, images)


def test_what_cannot_be_traced_is_one_line_and_no_file(tmp_path):
    model = models.build(segmentors.pspnet(), seed=0).eval()
    graph = deploy.Deployed(model, (64, 64), '--torch-export')
    graph.forward = lambda image: {}[float(image.sum())]
    with pytest.raises(ConfigError, match='^--torch-export: EncoderDecoder cannot be exported .*mmdeploy'):
        deploy.write('torch_export', graph, tmp_path / 'model.pt2', {})
    assert list(tmp_path.iterdir()) == []


def test_missing_packages_are_one_line_with_the_command(monkeypatch):
    monkeypatch.setattr(deploy, 'is_installed', lambda name: name == 'onnx')
    with pytest.raises(ConfigError, match=r'^--onnx: needs onnxruntime, onnxscript; pip install .mmkd\[onnx\]'):
        deploy.needs('onnx')
    deploy.needs('torch_export')


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """``mmkd export`` of a plain config in this process; the line it ends with, and the files it leaves."""
    config = streets_config(tmp_path, segmentors.pspnet(classes=3))
    config.dump(tmp_path / 'config.py')
    models.save_weights(config.model, tmp_path / 'weights.pth')
    (tmp_path / 'out').mkdir()

    def run(*options):
        arguments = [tmp_path / 'config.py', tmp_path / 'weights.pth', tmp_path / 'out' / 'plain', *options]
        monkeypatch.setattr(sys, 'argv', ['mmkd export', *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            command.main()
        return str(end.value), sorted(each.name for each in (tmp_path / 'out').iterdir())

    return run


def test_what_differs_from_torch_is_not_kept(call, monkeypatch):
    monkeypatch.setattr(deploy, 'TOLERANCE', -1.0)
    said, left = call('--torch-export')
    assert said.startswith(
        'error: --torch-export: EncoderDecoder cannot be exported (logits of a random image differs by'
    )
    assert left == []


def test_nothing_is_overwritten_and_a_plain_config_alone_is_refused(call, tmp_path):
    assert call() == (
        f'error: {tmp_path}/config.py: not a distilled model (model has no student); it can be used as it is',
        [],
    )
    (tmp_path / 'out' / 'plain.pt2').write_text('mine')
    assert call('--torch-export') == (
        f'error: {tmp_path}/out/plain.pt2 exists; remove it, or choose another name',
        ['plain.pt2'],
    )
    assert (tmp_path / 'out' / 'plain.pt2').read_text() == 'mine'


@pytest.mark.parametrize(
    ('pipeline', 'wanted'),
    [
        ([dict(type='Resize', scale=(150, 100))], (104, 152)),
        ([dict(type='Resize', scale=(150, 100)), dict(type='RandomFlip')], (104, 152)),
        ([dict(type='RandomFlip')], (40, 48)),
    ],
)
def test_the_size_is_the_test_pipelines_filled_up_or_the_validation_images(pipeline, wanted):
    model = dict(type='EncoderDecoder', data_preprocessor=dict(test_cfg=dict(size_divisor=8)))
    config = Config(dict(model=model, test_dataloader=dict(dataset=dict(pipeline=pipeline))))
    assert deploy.input_size(config, torch.zeros(1, 3, 40, 48)) == wanted
    if wanted == (40, 48):
        with pytest.raises(ConfigError, match='^--input-shape H W: '):
            deploy.input_size(config, None)


@pytest.fixture
def of_sources(tmp_path):
    """A config of a student of all sources, and a checkpoint of it."""
    config = streets_config(tmp_path, of_all_sources(tmp_path, 'PSPNet'))
    config.dump(tmp_path / 'config.py')
    model = MODELS.build(config.model)
    for index, value in enumerate(model.parameters()):  # no two parts have the same
        torch.nn.init.constant_(value, index / 1000)
    torch.save(
        dict(state_dict=model.state_dict(), meta=dict(dataset_meta=dict(classes=('a', 'b')))), tmp_path / 'it.pth'
    )
    return config, model


def written_by(tmp_path, monkeypatch, *options):
    paths = [str(tmp_path / each) for each in ('config.py', 'it.pth', 'plain')]
    monkeypatch.setattr(sys, 'argv', ['export', *paths, *options])
    command.main()
    assert 'mmkd' not in (tmp_path / 'plain.py').read_text()
    saved = torch.load(tmp_path / 'plain.pth', weights_only=True)
    assert saved['meta']['dataset_meta']['classes'] == ('a', 'b')
    return Config.fromfile(tmp_path / 'plain.py'), saved['state_dict']


@pytest.mark.parametrize('name', ['peer', 'mean'])
def test_a_peer_and_an_average_are_written_in_the_students_place(of_sources, tmp_path, monkeypatch, name):
    config, model = of_sources
    plain, state = written_by(tmp_path, monkeypatch, '--source', name)
    expected = model.sources[name].model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in state.items())
    same = dict(peer=config.model.teacher.peer.config, mean=config.model.student)[name]
    assert plain.model.decode_head == same.decode_head
    models.build(plain.model).load_state_dict(state, strict=True)


@pytest.mark.parametrize('name', ['large', 'own', 'pear'])
def test_of_other_sources_there_is_nothing_to_write(of_sources, tmp_path, monkeypatch, name):
    with pytest.raises(
        SystemExit, match=f"source '{name}': a checkpoint holds .* in this config there is 'mean', 'peer'"
    ):
        written_by(tmp_path, monkeypatch, '--source', name)
    assert not (tmp_path / 'plain.pth').exists()


def test_a_checkpoint_without_the_peer(of_sources, tmp_path, monkeypatch):
    _, model = of_sources
    torch.save(dict(state_dict=model.plain().state_dict()), tmp_path / 'it.pth')
    with pytest.raises(SystemExit, match="it.pth: holds nothing of a source 'peer'"):
        written_by(tmp_path, monkeypatch, '--source', 'peer')
