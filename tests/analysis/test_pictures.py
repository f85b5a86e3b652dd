"""What networks and methods look at: each method's pictures, and the hook through mmengine's real Runner."""

import pytest
import torch
from mmengine.runner import Runner
from tool import train_together

from mmkd import distill
from mmkd.analysis.pictures import DistillVisualizationHook, draw_batch, tap
from mmkd.distillers.base import Boxes
from mmkd.distillers.generic.cwd import channel_maps
from mmkd.distillers.segmentation.skd import similarity_to_center
from mmkd.errors import ConfigError
from mmkd.testing import detectors, models, segmentors
from mmkd.testing.batches import random_batch
from mmkd.testing.runs import distilled, of_all_sources, shapes_config, streets_config

DETECTION = dict(
    gid=dict(type='GID'),
    cwd=dict(type='CWD', layer='neck'),
    at=dict(type='AT', layer='neck'),
    fgfi=dict(type='FGFI', head='bbox_head'),
    fgd=dict(type='FGD'),
    frs=dict(type='FRS'),
)


def looked_at(student, teacher, distillers):
    model = distill(student, teacher, distillers)
    model.sources['teacher'].accept_current_weights()
    batch = model.data_preprocessor(random_batch(model, (2, 3, 96, 128)), True)
    with torch.no_grad():
        taps, others = tap(model, batch['inputs'], batch['data_samples'])
        found = {
            name: each.pictures(taps, others['teacher'], batch['data_samples'])
            for name, each in model.distillers.items()
        }
    return model, batch, found


def test_detection_methods_show_what_they_look_at():
    wide = models.build(detectors.retinanet(channels=24, base=12))
    model, batch, found = looked_at(models.build(detectors.retinanet()), wide, DETECTION)
    assert all(found[name] for name in DETECTION)
    (boxes,) = found['gid'].values()
    assert isinstance(boxes, Boxes)
    assert boxes.boxes.shape == (2, 10, 4)
    for name in set(DETECTION) - {'gid'}:
        for title, each in found[name].items():
            assert each.dim() == 3, (name, title)
            assert len(each) == 2, (name, title)
    assert set(found['fgd']) == {
        f'{who} attention, level {level}' for who in ('student', 'teacher') for level in range(3)
    }
    titles = {axis.get_title() for axis in draw_batch(model, batch['inputs'], batch['data_samples']).axes}
    assert {'gid: selected instances', 'fgfi: mask, level 0', 'frs: richness, level 0'} <= titles


def test_segmentation_methods_too():
    methods = dict(skd=dict(type='SKD'), kd=dict(type='KD'))
    _, _, found = looked_at(models.build(segmentors.pspnet()), models.build(segmentors.pspnet(24)), methods)
    assert [each.shape[0] for each in found['skd'].values()] == [2, 2]
    assert found['kd'] == {}


def test_what_a_method_trains_is_in_eval_mode_for_its_picture():
    student, teacher = (models.build(detectors.retinanet(channels)) for channels in (16, 24))
    model, batch, _ = looked_at(student, teacher, dict(ssim=dict(type='SSIM', layer='neck')))
    model.train()
    adapter = model.distillers['ssim'].levels.adapters[0]
    norm = torch.nn.BatchNorm2d(24)
    adapter.register_forward_hook(lambda module, inputs, output: norm.train(module.training)(output))
    draw_batch(model, batch['inputs'], batch['data_samples'])
    assert norm.num_batches_tracked == 0
    assert model.training
    assert adapter.training


def test_closed_forms():
    feature = torch.tensor([0.0, 1.0, 2.0, 3.0]).reshape(1, 1, 2, 2)
    assert channel_maps(feature, 2.0).flatten().tolist() == pytest.approx(
        (torch.tensor([0.0, 1.0, 2.0, 3.0]) / 2).softmax(0).tolist()
    )
    feature = torch.tensor([[1.0, 0.0, -1.0], [0.0, 1.0, 0.0]]).reshape(1, 2, 1, 3)
    assert similarity_to_center(feature).flatten().tolist() == pytest.approx([0, 1, 0])


def test_a_tap_leaves_the_model_as_it_is(tmp_path):
    model = models.build(of_all_sources(tmp_path, 'RetinaNet'))
    model.init_weights()
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch = model.data_preprocessor(random_batch(model, (2, 3, 96, 96)), True)
    student, others = tap(model, batch['inputs'], batch['data_samples'])
    assert 'backbone.layer4' in student  # which the student learns from itself
    assert set(others) == {'large', 'mean'}
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['detection', 'segmentation'])
def test_the_hook_writes_pictures_and_changes_no_weight(tmp_path, kind):
    weights = {}
    for name, hooks in {
        'without': [],
        'with': [dict(type='mmkd.DistillVisualizationHook', interval=2, images=1)],
    }.items():
        if kind == 'detection':
            config = shapes_config(tmp_path / name, distilled(tmp_path, DETECTION))
        else:
            model = dict(
                type='mmkd.Distill',
                student=segmentors.pspnet(),
                teacher=dict(
                    config=segmentors.pspnet(24),
                    checkpoint=models.save_weights(segmentors.pspnet(24), tmp_path / 'teacher.pth'),
                ),
                distillers=dict(skd=dict(type='SKD')),
            )
            config = streets_config(tmp_path / name, model)
            config.visualizer = dict(type='SegLocalVisualizer', vis_backends=[dict(type='LocalVisBackend')])
        config.custom_hooks = hooks
        config.visualizer.name = f'{kind} {name}'  # mmengine has one visualizer for each name
        config.param_scheduler = []
        runner = Runner.from_cfg(config)
        runner.train()
        weights[name] = runner.model.state_dict()
    assert all(torch.equal(value, weights['with'][name]) for name, value in weights['without'].items())
    pictures = sorted(each.name for each in (tmp_path / 'with' / 'work').rglob('vis_image/distillation_*.png'))
    assert pictures == ['distillation_0.png', 'distillation_2.png']


def test_a_plain_model_and_values_that_are_none_are_one_line(tmp_path):
    with pytest.raises(ConfigError, match='DistillVisualizationHook: images=0: expected a positive whole number'):
        DistillVisualizationHook(images=0)
    config = shapes_config(tmp_path, detectors.retinanet(classes=6))
    config.custom_hooks = [dict(type='mmkd.DistillVisualizationHook')]
    with pytest.raises(ConfigError, match='DistillVisualizationHook: the model learns from nobody'):
        Runner.from_cfg(config).train()


@pytest.mark.slow
@pytest.mark.long
def test_two_processes_with_both_hooks_end_as_without(tmp_path):
    model = distilled(tmp_path, DETECTION)
    weights = {}
    for name, hooks in {
        'without': [],
        'with': [
            dict(type='mmkd.GradientShareHook', interval=2),
            dict(type='mmkd.DistillVisualizationHook', interval=2, images=1),
        ],
    }.items():
        config = shapes_config(tmp_path, model, batch=2)
        config.work_dir, config.custom_hooks = str(tmp_path / name), hooks
        config.dump(tmp_path / f'{name}.py')
        train_together(tmp_path / f'{name}.py', 2)
        weights[name] = torch.load(tmp_path / name / 'iter_4.pth', weights_only=True)['state_dict']
    assert weights['with'].keys() == weights['without'].keys()
    assert all(torch.equal(value, weights['with'][name]) for name, value in weights['without'].items())
    (log,) = (tmp_path / 'with').glob('*/vis_data/scalars.json')
    assert '"share.gid.feature"' in log.read_text()
