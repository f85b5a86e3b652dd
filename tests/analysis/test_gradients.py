"""Gradient shares: closed forms, and the hook through mmengine's real Runner."""

import math

import pytest
import torch
from mmengine.runner import Runner
from torch import nn

from mmkd.analysis.gradients import GradientShareHook, pulls, without_loss
from mmkd.errors import ConfigError
from mmkd.testing import detectors
from mmkd.testing.runs import distilled, shapes_config

METHODS = dict(gid=dict(type='GID'), cwd=dict(type='CWD', layer='neck'))


def test_norm_share_and_cosine_of_linear_losses():
    parameter = nn.Parameter(torch.ones(2))
    task, other = torch.tensor([3.0, 4.0]), torch.tensor([0.0, -10.0])
    losses = {
        'loss_cls': (task * parameter).sum() / 2,
        'loss_bbox': [(task * parameter).sum() / 4, (task * parameter).sum() / 4],  # of two levels
        'acc': torch.tensor(0.5),
        'gid.loss_feature': (other * parameter).sum(),
        'gid.instances': torch.tensor(7.0),
        'critic.loss': nn.Parameter(torch.ones(())) * 2,  # of a part of its own
    }
    found = pulls(losses, ['gid', 'critic'], [parameter])
    assert set(found) == {'task', 'gid.loss_feature'}
    assert [float(each) for each in found['task']] == pytest.approx([5, 1 / 3, 1])
    assert [float(each) for each in found['gid.loss_feature']] == pytest.approx([10, 2 / 3, -0.8])
    losses['loss_cls'].backward()  # the graph is still there


def test_a_parameter_that_a_loss_does_not_reach_counts_as_zero():
    one, two = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    losses = {'loss': (one + two).sum(), 'cwd.loss': 2 * one.sum()}
    found = pulls(losses, ['cwd'], [one, two])
    assert float(found['cwd.loss'].norm) == pytest.approx(math.sqrt(8))
    assert float(found['cwd.loss'].cosine) == pytest.approx(4 / math.sqrt(8) / 2)


@pytest.mark.parametrize(
    ('name', 'short'),
    [('task', 'task'), ('cwd.loss', 'cwd'), ('gid.loss_feature', 'gid.feature'), ('a.loss_b_loss', 'a.b')],
)
def test_the_log_keys_are_not_optimized(name, short):
    assert without_loss(name) == short


@pytest.mark.slow
def test_the_hook_logs_and_changes_no_weight(tmp_path):
    weights = {}
    ramp = dict(METHODS, cwd=dict(METHODS['cwd'], loss_weight=dict(type='linear', value=1.0, end=4)))
    for name, hooks in {'without': [], 'with': [dict(type='mmkd.GradientShareHook', interval=2)]}.items():
        config = shapes_config(tmp_path / name, distilled(tmp_path, ramp))
        config.custom_hooks = hooks
        runner = Runner.from_cfg(config)
        runner.train()
        weights[name] = runner.model.state_dict()
    assert all(torch.equal(value, weights['with'][name]) for name, value in weights['without'].items())
    shares = runner.message_hub.log_scalars['train/share.task'].data[0]
    assert shares.shape == (2,)  # iterations 0 and 2 of 4
    logged = {key.removeprefix('train/'): each.current() for key, each in runner.message_hub.log_scalars.items()}
    found = {key.removeprefix('share.'): value for key, value in logged.items() if key.startswith('share.')}
    assert set(found) == {'task', 'gid.feature', 'gid.relation', 'gid.cls', 'gid.bbox', 'cwd'}
    assert sum(found.values()) == pytest.approx(1, abs=1e-3)
    assert all(-1.0001 <= logged[f'cosine.{name}'] <= 1.0001 for name in found if name != 'task')
    assert {key: value for key, value in logged.items() if key.startswith('weight.')} == {'weight.cwd': 0.5}
    assert not runner.model._forward_hooks


def test_a_plain_model_and_an_interval_that_is_none_are_one_line(tmp_path):
    with pytest.raises(ConfigError, match='GradientShareHook: interval=0: expected a positive whole number'):
        GradientShareHook(0)
    config = shapes_config(tmp_path, detectors.retinanet(classes=6))
    config.custom_hooks = [dict(type='mmkd.GradientShareHook')]
    with pytest.raises(ConfigError, match='it is for distilled models'):
        Runner.from_cfg(config).train()
