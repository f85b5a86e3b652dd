"""What the tools share: reading configs, the Runner, pictures."""

import argparse
import json
import logging
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner

import mmkd
from mmkd import cli
from mmkd.errors import ConfigError, Stopped
from mmkd.hosts.hooks import StopAtInvalidLoss
from mmkd.testing import detectors, models, segmentors
from mmkd.testing.batches import random_batch
from mmkd.testing.runs import distilled, shapes_config, streets_config

pytestmark = pytest.mark.slow


ROOT = Path(__file__).parents[1]


def read(path, **options):
    return cli.read_config(
        argparse.Namespace(
            config=str(path), cfg_options=options, launcher='none', local_rank=0, work_dir=None, trust_checkpoint=False
        )
    )


# reading configs

CHILD = """
model = dict(type='mmkd.Distill', student=dict(), distillers=dict(), teacher={teacher})
"""


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """The folder of a config, and the current one."""
    own, current = tmp_path / 'own', tmp_path / 'current'
    for folder in (own, current):
        folder.mkdir()
    monkeypatch.chdir(current)
    return own, current


@pytest.mark.parametrize(
    'teacher', ["'teacher.py'", "dict(config='teacher.py')", "dict(one=dict(config='teacher.py'))"]
)
def test_a_teachers_config_is_looked_for_beside_the_config_that_names_it_then_in_the_current_folder(folders, teacher):
    own, current = folders
    (own / 'student.py').write_text(CHILD.format(teacher=teacher))

    def found():
        spec = read(own / 'student.py').model.teacher
        spec = spec if isinstance(spec, str) else spec.get('one', spec)
        return spec if isinstance(spec, str) else spec.config

    with pytest.raises(ConfigError, match=f'^teacher config teacher.py: no such file .looked in {own} and {current}.$'):
        found()
    (current / 'teacher.py').touch()
    assert found() == 'teacher.py'
    (own / 'teacher.py').touch()
    assert found() == str(own / 'teacher.py')


def test_a_teachers_checkpoint_is_looked_for_in_the_same_places(folders):
    own, _ = folders
    (own / 'teacher.py').touch()
    (own / 'student.py').write_text(CHILD.format(teacher="dict(config='teacher.py', checkpoint='w/x.pth')"))
    assert read(own / 'student.py').model.teacher.checkpoint == 'w/x.pth'
    (own / 'w').mkdir()
    (own / 'w' / 'x.pth').touch()
    assert read(own / 'student.py').model.teacher.checkpoint == str(own / 'w' / 'x.pth')
    # what the command line names begins where the command is given
    assert read(own / 'student.py', **{'model.teacher.checkpoint': 'w/x.pth'}).model.teacher.checkpoint == 'w/x.pth'


def test_options_of_a_teacher_that_is_not_there(tmp_path):
    (tmp_path / 'plain.py').write_text("model = dict(type='RetinaNet')\n")
    with pytest.raises(
        ConfigError,
        match=r'^--cfg-options model.teacher.checkpoint: .*plain.py trains a plain model, which has no teacher$',
    ):
        read(tmp_path / 'plain.py', **{'model.teacher.checkpoint': 'x'})
    (tmp_path / 'none.py').write_text('a = 1\n')
    with pytest.raises(ConfigError, match=r'^config .*none.py: it has no model$'):
        read(tmp_path / 'none.py')


def test_a_type_may_be_a_class(tmp_path):
    """In new-style configs mmengine handles it; in those with ``_base_`` it can not print it."""
    (tmp_path / 'base.py').write_text('model = dict(parts=[dict(type="X")])\n')
    use = 'from torch.nn import Linear\nmodel = dict(type=Linear)\n'
    (tmp_path / 'old.py').write_text("_base_ = 'base.py'\n" + use)
    (tmp_path / 'new.py').write_text(use)
    old, new = (read(tmp_path / f'{name}.py') for name in ('old', 'new'))
    assert old.model == dict(type='torch.nn.modules.linear.Linear', parts=[dict(type='X')])
    assert "type='torch.nn.modules.linear.Linear'" in old.pretty_text
    assert new.model.type is torch.nn.Linear
    assert "type='torch.nn.Linear'" in new.pretty_text


# errors


def ended(error, capsys, debug=False, step=0):
    """The line that an error ends a tool with, and what was printed before."""

    def tool():
        with cli.clear_errors(debug) as begun:
            begun.step = step
            raise error

    with pytest.raises(SystemExit) as exit:
        tool()
    printed = capsys.readouterr()
    assert printed.out == ''
    return exit.value.code, printed.err


def test_before_the_first_iteration_an_error_is_one_line_whoever_raises_it(capsys):
    assert ended(ConfigError('model: no'), capsys) == ('error: model: no', '')
    line = 'error: KeyError: lr; --debug shows the traceback'
    assert ended(KeyError('lr'), capsys) == (line, '')
    assert ended(ValueError('one\ntwo'), capsys)[0] == 'error: ValueError: one; --debug shows the traceback'
    assert ended(AssertionError(), capsys)[0] == 'error: AssertionError; --debug shows the traceback'


def test_debug_shows_the_traceback(capsys):
    for error in (ConfigError('model: no'), KeyError('lr')):
        line, printed = ended(error, capsys, debug=True)
        assert printed.startswith('Traceback (most recent call last)')
        assert line in ('error: model: no', 'error: KeyError: lr')


def test_in_training_an_error_keeps_its_traceback(capsys):
    line, printed = ended(KeyError('lr'), capsys, step=7)
    assert line == 'error: KeyError: lr (in iteration 7)'
    assert "KeyError: 'lr'" in printed.splitlines()
    assert ended(ConfigError('layer: no'), capsys, step=7) == ('error: layer: no', '')


def test_an_error_of_a_data_worker_is_its_own_line(capsys):
    class Broken(torch.utils.data.Dataset):
        def __len__(self):
            return 1

        def __getitem__(self, index):
            raise KeyError('bbox')

    with pytest.raises(KeyError) as error:
        next(iter(torch.utils.data.DataLoader(Broken(), num_workers=1)))
    assert ended(error.value, capsys)[0] == "error: KeyError: 'bbox'; --debug shows the traceback"


# short runs


class Line(BaseModel):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def forward(self, inputs, mode='tensor'):
        return dict(loss=self.layer(torch.stack(inputs)).square().mean())


class Ones(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return dict(inputs=torch.ones(1))


class Rates(Hook):
    def __init__(self):
        self.rates = []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.rates.append(runner.optim_wrapper.get_lr()['lr'][0])


def rates(name, folder, iterations):
    """The learning rate of each iteration of a run with a config's schedule."""
    config = Config.fromfile(ROOT / 'configs' / name)
    for part in ('val', 'test'):
        for key in ('cfg', 'dataloader', 'evaluator'):
            config.pop(f'{part}_{key}')
    config.default_hooks = dict(checkpoint=None, logger=None)
    config.visualizer = None
    config.merge_from_dict({'train_cfg.max_iters': iterations, 'work_dir': str(folder), 'launcher': 'none'})
    config.model = dict(type='test_cli.Line')
    config.train_dataloader = dict(
        batch_size=2, dataset=dict(type='test_cli.Ones'), sampler=dict(type='InfiniteSampler')
    )
    config.experiment_name = f'{folder.name}_{iterations}'
    config.custom_hooks = [dict(type='test_cli.Rates')]
    before = list(config.param_scheduler)
    runner = cli.build_runner(config)
    runner.train()
    (rates,) = (hook.rates for hook in runner.hooks if type(hook).__name__ == 'Rates')
    return rates, before == config.param_scheduler


@pytest.mark.parametrize('name', ['shapes/retinanet_student.py', 'streets/pspnet_student.py'])
def test_a_run_may_be_shorter_than_its_warm_up(name, tmp_path):
    stock, unchanged = rates(name, tmp_path, 600)
    assert unchanged
    assert stock[0] == pytest.approx(3e-4)
    assert stock[50] == max(stock) == pytest.approx(3e-3)
    assert stock[-1] < 1e-4
    for iterations in (1, 50):
        short, _ = rates(name, tmp_path, iterations)
        assert short == stock[:iterations]
    longer, unchanged = rates(name, tmp_path, 53)
    assert unchanged
    assert longer[:50] == stock[:50]
    assert longer[50] == stock[50] > longer[51] > longer[52]


# stopping what cannot work


def test_a_training_that_never_began_is_none(tmp_path):
    """What the Runner writes before there is a model does not count, so that the teachers are looked at again."""
    config = Config(
        dict(model=dict(type='test_cli.Line'), launcher='none', work_dir=str(tmp_path), experiment_name=tmp_path.name)
    )
    assert not cli.was_trained(config)
    runner = cli.build_runner(config)
    assert list(tmp_path.glob('*/vis_data'))
    assert not cli.was_trained(config)
    runner.visualizer.add_scalars(dict(loss=1.0), step=1)
    assert cli.was_trained(config)


@pytest.mark.parametrize(('accumulated', 'expected'), [(1, 0.1), (4, 0.4)])
def test_the_learning_rate_is_scaled_by_what_a_step_sees(accumulated, expected):
    config = Config(
        dict(
            auto_scale_lr=dict(base_batch_size=16),
            optim_wrapper=dict(accumulative_counts=accumulated, optimizer=dict(lr=0.1)),
        )
    )
    cli.scale_learning_rate(config)
    wrapper = OptimWrapper(torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1))
    runner = SimpleNamespace(
        world_size=2, _train_dataloader=dict(batch_size=8), logger=logging.getLogger(), param_schedulers=None
    )
    Runner.scale_lr(runner, wrapper, config.auto_scale_lr)
    assert wrapper.optimizer.param_groups[0]['lr'] == pytest.approx(expected)


class Broken(Line):
    def forward(self, inputs, mode='tensor'):
        loss = super().forward(inputs, mode)['loss']
        return dict(loss_a=loss, loss_b=loss.detach() * float('nan'), accuracy=loss)


@pytest.mark.parametrize(('interval', 'last'), [(2, 2), (50, 3)])
def test_an_invalid_loss_ends_the_training(tmp_path, interval, last):
    config = Config(
        dict(
            model=dict(type='test_cli.Broken'),
            train_dataloader=dict(
                batch_size=2, dataset=dict(type='test_cli.Ones'), sampler=dict(type='InfiniteSampler')
            ),
            train_cfg=dict(type='IterBasedTrainLoop', max_iters=3),
            optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
            custom_hooks=[dict(type='mmkd.hosts.hooks.StopAtInvalidLoss', interval=interval)],
            work_dir=str(tmp_path),
            launcher='none',
            experiment_name=f'{tmp_path.name}',
        )
    )
    runner = cli.build_runner(config)
    cli.watch(runner)
    assert sum(isinstance(hook, StopAtInvalidLoss) for hook in runner.hooks) == 1
    message = (
        f'^iteration 1, process 0: loss_b is nan; the training was stopped, and .* in {tmp_path}/invalid_loss.json:'
    )
    with pytest.raises(Stopped, match=message):
        runner.train()
    assert runner.iter + 1 == last  # when it is looked at
    report = json.loads((tmp_path / 'invalid_loss.json').read_text())
    assert report['iteration'] == 1
    assert math.isnan(report['terms']['loss_b'])


def test_the_layers_of_an_invalid_loss_are_those_of_the_student_where_it_teaches_itself():
    entry = dict(type='AT', layer='backbone.layer3', teacher_layer='backbone.layer4')
    model = mmkd.distill(models.build(segmentors.pspnet(), seed=0), dict(own=dict(type='Own')), dict(at=entry)).train()
    hook = StopAtInvalidLoss()
    hook._batch = random_batch(model, (2, 3, 64, 64))
    found = hook._statistics(SimpleNamespace(model=model))
    assert found.keys() == {'student'}
    assert found['student'].keys() == {'backbone.layer3', 'backbone.layer4'}


class Scaler:
    """As torch's in float16: a scale, which falls where a step was left out."""

    def __init__(self, *scales):
        self.scales = list(scales)

    def is_enabled(self):
        return True

    def get_scale(self):
        return self.scales.pop(0)


@pytest.mark.parametrize(
    ('scales', 'loss', 'clean'),
    [
        ((8.0, 4.0), float('nan'), True),  # the scaler left it out
        ((8.0, 8.0), float('nan'), False),  # it did not
        ((8.0, 4.0, 2.0), float('nan'), False),  # more in a row than may be
        ((8.0, 4.0), 1.0, True),  # the scale was too large, which is no fault of the loss
    ],
)
def test_steps_that_a_gradient_scaler_leaves_out_are_counted(scales, loss, clean):
    hook = StopAtInvalidLoss(skip=1)
    runner = SimpleNamespace(
        optim_wrapper=SimpleNamespace(loss_scaler=Scaler(*scales)), iter=0, max_iters=99, world_size=1
    )
    module = torch.nn.Identity().train()
    for step in range(len(scales)):
        hook._iteration = step
        hook._look(module, (), dict(loss=torch.tensor(loss if step else 1.0)))
        hook.after_train_iter(runner, step)
    found = [bool((first != 2**40).any()) for first, _ in hook._found.values()]
    assert any(found) != clean
    assert hook.skipped == (len(scales) - 1 if loss != loss and scales[0] > scales[1] else 0)


def test_what_is_watched_by_default(tmp_path):
    def hooks(config, **changes):
        config.merge_from_dict(dict(launcher='none', **changes))
        config.experiment_name = f'{tmp_path.name}{len(changes)}{config.default_scope}'
        runner = cli.build_runner(config)
        cli.watch(runner)
        return [type(hook).__name__ for hook in runner.hooks]

    plain = shapes_config(tmp_path, detectors.retinanet(classes=6))
    found = hooks(plain)
    assert found.count('NumClassCheckHook') == found.count('StopAtInvalidLoss') == 1
    own = dict(custom_hooks=[dict(type='NumClassCheckHook'), dict(type='CheckInvalidLossHook')])
    found = hooks(plain, **own)
    assert found.count('NumClassCheckHook') == found.count('CheckInvalidLossHook') == 1
    assert 'StopAtInvalidLoss' not in found
    found = hooks(streets_config(tmp_path, segmentors.pspnet()))
    assert 'StopAtInvalidLoss' in found
    assert 'NumClassCheckHook' not in found


def test_a_distilled_detector_passes_mmdets_check_of_its_classes(tmp_path):
    config = shapes_config(tmp_path, distilled(tmp_path, dict(gid=dict(type='GID'))), iterations=1)
    config.launcher = 'none'
    runner = cli.build_runner(config)
    cli.watch(runner)
    runner.train()
    assert runner.iter == 1


# pictures


@pytest.mark.parametrize('task', ['detection', 'segmentation'])
def test_every_prediction_is_drawn_into_the_folder(task, tmp_path):
    if task == 'detection':
        config = shapes_config(tmp_path, detectors.retinanet(classes=6))
    else:
        config = streets_config(tmp_path, segmentors.pspnet())
        config.visualizer = dict(type='SegLocalVisualizer', name=f'{tmp_path.name}')
    config.load_from = models.save_weights(config.model, tmp_path / 'weights.pth')
    config.launcher = 'none'
    runner = cli.build_runner(config)
    pictures = cli.draw_predictions(runner, str(tmp_path / 'shown'))
    runner.test()
    drawn = [path for path in (tmp_path / 'shown').rglob('*') if path.is_file()]
    assert pictures.written == len(drawn) == 8
    images = {path.name for path in (tmp_path / ('shapes' if task == 'detection' else 'streets')).rglob('val/**/*')}
    assert {path.name for path in drawn} <= images


def test_a_visualizer_that_draws_nothing(tmp_path):
    config = streets_config(tmp_path, segmentors.pspnet())
    config.launcher = 'none'
    with pytest.raises(ConfigError, match='^--show-dir: visualizer=Visualizer draws no predictions; set visualizer='):
        cli.draw_predictions(cli.build_runner(config), str(tmp_path))
