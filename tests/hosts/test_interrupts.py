"""A training that is told to stop saves its state first."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from mmengine.hooks import Hook
from test_kills import differences
from tool import tool, train_together

from mmkd.testing.runs import distilled, shapes_config

METHODS = dict(gid=dict(type='GID'), mgd=dict(type='MGD', layer='neck'))


class Tell(Hook):
    """Send a signal to this process, or to it and all its children as a cluster does, in one iteration."""

    def __init__(self, iteration, number=signal.SIGTERM, rank=0, children=False):
        self.iteration, self.number, self.rank, self.children = iteration, number, rank, children

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter + 1 == self.iteration and runner.rank == self.rank:
            processes = [os.getpid()]
            if self.children:
                processes += map(int, Path(f'/proc/{os.getpid()}/task/{os.getpid()}/children').read_text().split())
                assert len(processes) > 2
            for each in reversed(processes):
                os.kill(each, self.number)
            time.sleep(0.2)


def build(tmp_path, **loader):
    config = shapes_config(tmp_path, distilled(tmp_path, METHODS), iterations=12, batch=2, images=10)
    config.default_hooks.checkpoint.interval = 100
    config.train_dataloader.update(loader)
    return config


def check_equal(one, two):
    one, two = (torch.load(path, weights_only=True) for path in (one, two))
    assert one['meta']['iter'] == two['meta']['iter']
    for part in ('state_dict', 'optimizer', 'param_schedulers'):
        assert not list(differences(one[part], two[part], part))


@pytest.mark.long
def test_a_signal_saves_and_the_training_goes_on_from_there(tmp_path):
    config = build(tmp_path, num_workers=2)
    # epochs of 5 iterations; by iteration it is as in two processes, below
    config.train_dataloader.sampler = dict(type='DefaultSampler', shuffle=True)
    config.train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=3)
    config.param_scheduler = [dict(type='MultiStepLR', milestones=[1, 2])]
    config.default_hooks.checkpoint.update(by_epoch=True)
    config.dump(tmp_path / 'whole.py')
    tool('train', tmp_path / 'whole.py', '--work-dir', tmp_path / 'whole')
    parts = tmp_path / 'parts'
    for iteration, number in ((3, signal.SIGTERM), (10, signal.SIGUSR1)):
        # the tenth is the last of an epoch, which is ended first
        stopped = iteration + (iteration == 10)
        config.custom_hooks = [
            dict(type='test_interrupts.Tell', iteration=iteration, number=int(number), children=True)
        ]
        path = tmp_path / f'tell{iteration}.py'
        config.dump(path)
        printed = tool('train', path, '--work-dir', parts, '--resume', expect=75)
        assert f'told to stop after iteration {stopped}; its state is in {parts}/interrupted.pth' in printed
        assert (parts / 'last_checkpoint').read_text() == f'{parts}/interrupted.pth'
        assert torch.load(parts / 'interrupted.pth', weights_only=True)['meta']['iter'] == stopped
    tool('train', tmp_path / 'whole.py', '--work-dir', parts, '--resume')
    check_equal(tmp_path / 'whole' / 'epoch_3.pth', parts / 'epoch_3.pth')
    assert not (parts / 'interrupted.pth').exists()


@pytest.mark.long
def test_all_processes_stop_after_the_same_iteration(tmp_path):
    config = build(tmp_path)
    config.dump(tmp_path / 'whole.py')
    config.custom_hooks = [dict(type='test_interrupts.Tell', iteration=4, rank=1)]  # told to the second alone
    config.dump(tmp_path / 'tell.py')
    printed = train_together(tmp_path / 'tell.py', 2, '--work-dir', tmp_path / 'parts', expect=75)
    assert 'told to stop after iteration 5; its state is in' in printed[0]  # an iteration later
    train_together(tmp_path / 'whole.py', 2, '--work-dir', tmp_path / 'parts', '--resume')
    train_together(tmp_path / 'whole.py', 2, '--work-dir', tmp_path / 'whole')
    check_equal(tmp_path / 'whole' / 'iter_12.pth', tmp_path / 'parts' / 'iter_12.pth')


class TellEarly(Hook):
    """Send a signal when the Runner is built."""

    def __init__(self):
        os.kill(os.getpid(), signal.SIGUSR1)


def test_a_signal_before_the_training_is_not_lost(tmp_path):
    config = build(tmp_path)
    config.custom_hooks = [dict(type='test_interrupts.TellEarly')]
    config.dump(tmp_path / 'config.py')
    assert 'told to stop after iteration 1;' in tool('train', tmp_path / 'config.py', expect=75)
