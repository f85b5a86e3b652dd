"""What of mmengine's, mmdet's and mmseg's engine works with a distilled student: the rows of docs/engine.md, in their order."""

import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from mmengine.registry import MODELS
from mmengine.runner import Runner
from tool import tool, train_together
from torch import nn

from mmkd.distill import distill
from mmkd.errors import ConfigError
from mmkd.hosts.engine import check_engine
from mmkd.testing import detectors, models, segmentors
from mmkd.testing.batches import random_batch
from mmkd.testing.runs import distilled, of_all_sources, shapes_config, streets_config

pytestmark = [pytest.mark.slow, pytest.mark.long]

METHODS = dict(gid=dict(type='GID'), cwd=dict(type='CWD', layer='neck'))


@pytest.fixture
def config(tmp_path):
    return shapes_config(tmp_path, distilled(tmp_path, METHODS))


def trained(config, name=None):
    """Train in this process; the weights in the end, and what was logged."""
    if name:
        config.work_dir = f'{config.work_dir}_{name}'
        config.experiment_name = f'{config.experiment_name}_{name}'  # mmengine keeps loggers by name
    runner = Runner.from_cfg(config)
    runner.train()
    return runner.model.state_dict(), runner.message_hub


def in_two_processes(config, folder, name, **changes):
    """The checkpoint at the end of a training in two processes."""
    config = config.copy()
    config.merge_from_dict(changes)
    config.work_dir = str(folder / name)
    path = folder / f'{name}.py'
    config.dump(path)
    train_together(path, 2)
    last = (folder / name / 'last_checkpoint').read_text()
    return torch.load(last, weights_only=True)


def from_one_start(config, folder):
    """The config with given weights in the beginning and without augmentation: Runners draw random numbers in another order."""
    config = config.copy()
    dataset = config.train_dataloader.dataset
    dataset.pipeline = [step for step in dataset.pipeline if step.type != 'RandomFlip']
    model = MODELS.build(config.model)
    model.init_weights()
    torch.save(dict(state_dict=model.state_dict()), folder / 'start.pth')
    config.load_from = str(folder / 'start.pth')
    return config


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


def assert_close(found, expected, part=1e-3):
    """Up to float32 rounding of sums that are taken in another order: a part of each tensor's largest value."""
    assert found.keys() == expected.keys()
    for name, value in found.items():
        difference = (value.double() - expected[name].double()).abs().max()
        assert difference <= part * expected[name].double().abs().max() + 1e-7, name


def losses_of(hub, key='train/loss'):
    return list(hub.get_scalar(key).data[0])


def logged(folder, key):
    """What each step of a training logged."""
    (file,) = folder.glob('*/vis_data/scalars.json')
    return [step[key] for step in map(json.loads, file.read_text().splitlines()) if key in step]


def test_two_accumulated_steps_over_the_same_images_are_one(tmp_path):
    config = shapes_config(tmp_path, distilled(tmp_path, METHODS), iterations=1, batch=2, images=2)
    config.train_dataloader.sampler = dict(type='InfiniteSampler', shuffle=False)
    pipeline = config.train_dataloader.dataset.pipeline
    config.train_dataloader.dataset.pipeline = [step for step in pipeline if step.type != 'RandomFlip']
    config.param_scheduler = []
    once, _ = trained(config, 'once')
    config.train_cfg.max_iters = 2
    config.optim_wrapper.accumulative_counts = 2
    accumulated, _ = trained(config, 'accumulated')
    assert_close(accumulated, once, 1e-5)


def test_bfloat16_on_a_cpu(config):
    exact, hub = trained(config, 'exact')
    expected = losses_of(hub)
    config.optim_wrapper.type = 'mmkd.Bf16OptimWrapper'
    rounded, hub = trained(config, 'rounded')
    # of the first step, whose weights are equal; not equal, or it would be float32
    found = losses_of(hub)
    assert found[0] == pytest.approx(expected[0], rel=3e-2)
    assert found[0] != expected[0]
    assert {value.dtype for value in rounded.values()} == {value.dtype for value in exact.values()}
    assert all(torch.isfinite(value).all() for value in rounded.values())


def test_a_teacher_in_half_precision_beside_a_student_in_float32(config):
    for dtype in ('float16', 'bfloat16'):
        config.model.teacher.dtype = dtype
        weights, hub = trained(config, dtype)
        assert all(torch.isfinite(value).all() for value in weights.values())
        assert weights['neck.fpn_convs.0.conv.weight'].dtype == torch.float32
        assert losses_of(hub, 'train/cwd.loss')[0] > 0


def test_an_average_of_the_weights_has_the_trained_parts_and_no_teacher(config):
    config.custom_hooks = [dict(type='EMAHook', momentum=0.5, update_buffers=True)]
    config.optim_wrapper.clip_grad = None
    runner = Runner.from_cfg(config)
    runner.train()
    saved = torch.load(Path(config.work_dir) / 'iter_4.pth', weights_only=True)
    average = {name.removeprefix('module.'): value for name, value in saved['ema_state_dict'].items()}
    assert set(average) - {'steps'} == set(runner.model.state_dict())
    assert any(name.startswith('distillers.cwd') for name in average)
    moved = 'distillers.cwd.levels.adapters.0.conv.weight'
    assert not torch.equal(average[moved], saved['state_dict'][moved])


@pytest.mark.parametrize('where', ['student', 'teacher', 'config'])
def test_activation_checkpointing_changes_nothing(config, where):
    plain, _ = trained(config, 'plain')
    if where == 'config':
        config.activation_checkpointing = ['backbone.layer1', 'backbone.layer3']
    elif where == 'student':
        config.model.student.backbone.with_cp = True
    else:
        config.model.teacher.config.backbone.with_cp = True
    assert_close(trained(config, 'checkpointed')[0], plain, 1e-5)


def test_layer_wise_rules_see_plain_names(config):
    config.optim_wrapper.paramwise_cfg = dict(
        custom_keys={'backbone.': dict(lr_mult=0.1), 'distillers.gid': dict(lr_mult=2)}
    )
    runner = Runner.from_cfg(config)
    groups = runner.build_optim_wrapper(config.optim_wrapper).optimizer.param_groups
    rates = {round(group['lr'], 6) for group in groups}
    assert rates == {0.001, 0.01, 0.02}


@MODELS.register_module()
class SmallConvNeXt(nn.Module):
    """The names of ConvNeXt's parameters, of which layer-wise decay reads the depth."""

    def __init__(self):
        super().__init__()
        widths = (3, 8, 8, 16, 16)
        self.downsample_layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, 4 if a == 3 else 2, 1)) for a, b in itertools.pairwise(widths)
        )
        self.stages = nn.ModuleList(nn.Sequential(nn.Conv2d(each, each, 3, 1, 1)) for each in widths[1:])

    def forward(self, images):
        outputs = []
        for down, stage in zip(self.downsample_layers, self.stages):
            images = stage(down(images))
            outputs.append(images)
        return tuple(outputs)


@pytest.mark.parametrize('decay', ['layer_wise', 'stage_wise'])
@pytest.mark.parametrize(('package', 'make'), [('mmdet', shapes_config), ('mmseg', streets_config)])
def test_layer_wise_decay_gives_adapters_the_full_rate(tmp_path, package, make, decay):
    if package == 'mmdet':
        student = detectors.retinanet(classes=6)
        student.neck.in_channels = [8, 8, 16, 16]
        model = distilled(tmp_path, METHODS, student)
    else:
        student = segmentors.pspnet()
        student.pop('auxiliary_head')
        student.decode_head.in_channels = 16
        methods = dict(cwd=dict(type='CWD', layer='decode_head.bottleneck'))
        model = distilled(tmp_path, methods, student, segmentors.pspnet(24))
    student.backbone = dict(type='mmengine.SmallConvNeXt')
    config = make(tmp_path, model)
    config.optim_wrapper = dict(
        type='OptimWrapper',
        optimizer=dict(type='AdamW', lr=0.01, weight_decay=0.1),
        constructor='LearningRateDecayOptimizerConstructor',
        paramwise_cfg=dict(decay_rate=0.5, decay_type=decay, num_layers=6),
    )
    runner = Runner.from_cfg(config)
    groups = runner.build_optim_wrapper(config.optim_wrapper).optimizer.param_groups
    scales = {name: group['lr_scale'] for group in groups for name in group['param_names']}
    assert scales.keys() == dict(runner.model.named_parameters()).keys()
    adapters = {name: scale for name, scale in scales.items() if name.startswith('distillers.')}
    assert adapters
    assert set(adapters.values()) == {1.0}
    first, last = (scales[f'backbone.stages.{stage}.0.weight'] for stage in (0, 3))
    assert first < last <= 0.5
    runner.train()
    assert all(torch.isfinite(value).all() for value in runner.model.state_dict().values())


def test_synchronized_batch_norm_is_plain_in_one_process_and_one_line_in_two_on_a_cpu(tmp_path):
    methods = dict(kd=dict(type='KD'))
    config = streets_config(tmp_path, distilled(tmp_path, methods, segmentors.pspnet(), segmentors.pspnet(24)))
    plain, _ = trained(config, 'plain')
    for part in ('backbone', 'decode_head', 'auxiliary_head'):
        config.model.student[part].norm_cfg.type = 'SyncBN'
    assert_equal(trained(config, 'synchronized')[0], plain)
    config.launcher = 'pytorch'
    with pytest.raises(ConfigError, match=r'^SyncBN: batch norm is synchronized between GPUs alone'):
        check_engine(config)


@pytest.mark.parametrize('backend', ['eager', 'aot_eager'])
def test_compiled_parts_of_teacher_and_student_give_the_same_losses(tmp_path, backend):
    """As `make gpu` compiles them: the forward functions of backbone and neck, outside of which the taps' hooks are."""
    model = distill(
        student=models.build(detectors.retinanet(), seed=0),
        teacher=models.build(detectors.retinanet(channels=24), seed=1),
        distillers=METHODS,
    )
    model.init_weights()
    batch = model.data_preprocessor(random_batch(model, (2, 3, 96, 128)), True)
    expected = model(**batch, mode='loss')
    calls = []
    for network in (model, model.sources['teacher'].model):
        for part in (network.backbone, network.neck):
            part.forward = torch.compile(part.forward, backend=backend)
            part.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(2):
        found = model(**batch, mode='loss')
    assert len(calls) == 8
    for key in ('gid.loss_feature', 'gid.loss_cls', 'cwd.loss'):
        torch.testing.assert_close(found[key], expected[key], rtol=1e-5, atol=1e-7)
    total, _ = model.parse_losses(found)
    total.backward()
    assert all(torch.isfinite(each.grad).all() for each in model.distillers.parameters())


def test_the_runners_compile_gives_the_same_losses(config):
    config.train_cfg.max_iters = 2
    plain, hub = trained(config, 'plain')
    expected = losses_of(hub)
    config.compile = dict(backend='eager')
    weights, hub = trained(config, 'compiled')
    assert losses_of(hub) == pytest.approx(expected, rel=1e-5)
    assert_close(weights, plain, 1e-4)


WRAPPER = dict(type='MMDistributedDataParallel', broadcast_buffers=False, device_ids=None)
FLEXIBLE = dict(runner_type='FlexibleRunner', strategy=dict(type='DDPStrategy', model_wrapper=WRAPPER))


def test_the_flexible_runner_trains_as_the_runner(config, tmp_path):
    config = from_one_start(config, tmp_path)
    expected = in_two_processes(config, tmp_path, 'runner')['state_dict']
    found = in_two_processes(config, tmp_path, 'flexible', **FLEXIBLE)['state_dict']
    assert_equal({name.removeprefix('module.'): value for name, value in found.items()}, expected)


SHARDED = dict(runner_type='FlexibleRunner', strategy=dict(type='mmkd.ShardedStrategy'))


def test_a_sharded_student_ends_with_the_weights_of_an_unsharded_one(config, tmp_path):
    """Two processes; its checkpoint has the same names, and the norm of all gradients is what is logged and clipped."""
    config = from_one_start(config, tmp_path)
    expected = in_two_processes(config, tmp_path, 'ddp')
    found = in_two_processes(config, tmp_path, 'sharded', **SHARDED)
    assert_close(found['state_dict'], expected['state_dict'])
    assert any(name.startswith('distillers.cwd') for name in found['state_dict'])
    norms = [logged(tmp_path / name, 'grad_norm') for name in ('sharded', 'ddp')]
    assert len(norms[0]) == 4
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    plain = models.build(config.model.student)
    weights = {name: value for name, value in found['state_dict'].items() if not name.startswith('distillers.')}
    plain.load_state_dict(weights)


def test_a_sharded_training_resumes(config, tmp_path):
    config.default_hooks.checkpoint.interval = 2
    whole = in_two_processes(config, tmp_path, 'whole', **SHARDED)
    (tmp_path / 'whole' / 'iter_4.pth').unlink()
    (tmp_path / 'whole' / 'last_checkpoint').write_text(str(tmp_path / 'whole' / 'iter_2.pth'))
    path = tmp_path / 'whole.py'
    path.write_text(path.read_text().replace('resume = False', '') + '\nresume = True\n')
    train_together(path, 2)
    assert_equal(torch.load(tmp_path / 'whole' / 'iter_4.pth', weights_only=True)['state_dict'], whole['state_dict'])


def test_a_config_with_shards_trains_and_tests_in_one_process_too(config, tmp_path):
    config.merge_from_dict(SHARDED)
    config.default_hooks.checkpoint.interval = 2
    path = tmp_path / 'config.py'
    config.dump(path)
    tool('train', path)
    checkpoint = tmp_path / 'work' / 'iter_4.pth'
    trained = torch.load(checkpoint, weights_only=True)['state_dict']
    assert 'coco/bbox_mAP' in tool('test', path, checkpoint)
    checkpoint.unlink()
    tool('train', path, '--resume', tmp_path / 'work' / 'iter_2.pth')
    assert_equal(torch.load(checkpoint, weights_only=True)['state_dict'], trained)


def test_a_sharded_segmentor(tmp_path):
    """Whose heads mmseg does not call as modules; with a critic, which is differentiated twice."""
    methods = dict(skd=dict(type='SKD'), cirkd=dict(type='CIRKD', pixel_memory_size=300, region_memory_size=300))
    model = distilled(tmp_path, methods, segmentors.pspnet(), segmentors.pspnet(24))
    for part in ('decode_head', 'auxiliary_head'):
        model['student'][part].dropout_ratio = 0.0
    config = from_one_start(streets_config(tmp_path, model, batch=2), tmp_path)
    expected = in_two_processes(config, tmp_path, 'ddp')['state_dict']
    found = in_two_processes(config, tmp_path, 'sharded', **SHARDED)['state_dict']
    assert_close(found, expected, 1e-2)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (
            dict(optim_wrapper=dict(type='AmpOptimWrapper')),
            r"^optim_wrapper.type='AmpOptimWrapper': mmengine's needs an accelerator.*'mmkd.Bf16OptimWrapper'$",
        ),
        (dict(strategy=dict(type='DDPStrategy')), r'^strategy=DDPStrategy: .* would ignore it; add runner_type'),
        (dict(runner_type='FlexibleRunner', compile=True), r"^compile: mmengine's FlexibleRunner ignores it"),
        (
            dict(runner_type='FlexibleRunner', strategy=dict(type='FSDPStrategy')),
            r"^strategy=FSDPStrategy: torch's first FSDP needs an accelerator.*mmkd.ShardedStrategy",
        ),
        (
            dict(runner_type='FlexibleRunner', strategy=dict(type='DeepSpeedStrategy')),
            r'^strategy=DeepSpeedStrategy: deepspeed is not installed; pip install deepspeed==',
        ),
        (
            dict(
                runner_type='FlexibleRunner', strategy=dict(type='DeepSpeedStrategy', zero_optimization=dict(stage=3))
            ),
            r"^strategy.zero_optimization.stage=3: .* take stage 1 or 2, or strategy=dict\(type='mmkd.ShardedStrategy'\)",
        ),
        (
            dict(activation_checkpointing=['backbone.layer1', 'bbox_head']),
            r"^activation_checkpointing: 'bbox_head' .* would not be trained; .* 'backbone.layer2'",
        ),
        (
            dict(model_wrapper_cfg=dict(type='MMSeparateDistributedDataParallel')),
            r'^model_wrapper_cfg.type=MMSeparateDistributedDataParallel wraps each part',
        ),
    ],
)
def test_what_cannot_work_is_one_line(config, changes, message):
    config.merge_from_dict(changes)
    with pytest.raises(ConfigError, match=message):
        check_engine(config)


def test_a_head_of_mmseg_cannot_be_a_part(tmp_path):
    model = distilled(tmp_path, dict(kd=dict(type='KD')), segmentors.pspnet(), segmentors.pspnet(24))
    config = streets_config(tmp_path, model)
    config.merge_from_dict(SHARDED)
    config.strategy.parts = ['backbone', 'decode_head']
    path = tmp_path / 'config.py'
    config.dump(path)
    with pytest.raises(AssertionError, match=r"error: strategy.parts: 'decode_head' is a head of mmseg"):
        train_together(path, 2)


def test_an_average_cannot_follow_a_sharded_student(tmp_path):
    config = shapes_config(tmp_path, of_all_sources(tmp_path, 'RetinaNet'))
    config.merge_from_dict(SHARDED)
    with pytest.raises(ConfigError, match=r'^strategy=ShardedStrategy: model.teacher.mean copies the whole student'):
        check_engine(config)


def test_the_tools_say_so_before_the_first_iteration(config, tmp_path):
    config.optim_wrapper.type = 'AmpOptimWrapper'
    path = tmp_path / 'config.py'
    config.dump(path)
    printed = tool('train', path, expect=1)
    assert re.search(r'^error: optim_wrapper.type=', printed, re.MULTILINE)
    assert 'Traceback' not in printed
