"""What goes wrong in mid-training ends it with one line, and leaves what was written before as it was."""

import json
import os
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from mmengine.hooks import Hook
from tool import tool, train_together

from mmkd.errors import first_line
from mmkd.hosts.checkpoints import latest_checkpoint
from mmkd.testing import detectors, models
from mmkd.testing.runs import distilled, shapes_config

CWD = dict(cwd=dict(type='CWD', layer='neck'))


class Poison(Hook):
    """Make a bias NaN before an iteration, for that one alone if ``once``, in one process."""

    def __init__(self, iteration, layer, rank=0, once=False):
        self.iteration, self.layer, self.rank, self.once = iteration, layer, rank, once

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        bias = getattr(runner.model, 'module', runner.model).get_submodule(self.layer).bias.data
        if runner.rank == self.rank and runner.iter + 1 == self.iteration:
            self.kept = bias.clone()
            bias.fill_(float('nan'))
        elif runner.iter == self.iteration and self.once:
            bias.copy_(self.kept)


class FileLimit(Hook):
    """From an iteration on no file may be larger than a checkpoint is, as on a disk that is full."""

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


class BreakImages(Hook):
    """Cut the training images off in mid-training."""

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == 2:
            for image in Path(runner.train_dataloader.dataset.data_prefix['img']).iterdir():
                image.write_bytes(image.read_bytes()[:300])


class KillWorker(Hook):
    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == 3:
            children = Path(f'/proc/{os.getpid()}/task/{os.getpid()}/children').read_text().split()
            os.kill(int(children[0]), signal.SIGKILL)
            time.sleep(0.5)


def build(folder, *hooks, interval=2, distillers=CWD, **loader):
    config = shapes_config(folder, distilled(folder, distillers), iterations=8, batch=2)
    config.default_hooks.checkpoint.interval = interval
    config.train_dataloader.update(loader)
    config.custom_hooks = list(hooks)
    config.dump(folder / 'config.py')
    return folder / 'config.py'


def line(printed):
    last = printed.strip().splitlines()[-1]
    assert last.startswith('error: '), printed[-2000:]
    assert 'Traceback' not in printed
    return last


@pytest.mark.slow
def test_an_invalid_loss_names_term_level_iteration_and_images(tmp_path):
    path = build(tmp_path, dict(type='test_faults.Poison', iteration=6, layer='neck.fpn_convs.2.conv'))
    last = line(tool('train', path, expect=1))
    assert 'iteration 6, process 0: loss_cls[2] is nan, loss_bbox[2] is nan, cwd.loss is nan;' in last
    assert 'loss_cls[1]' not in last
    report = json.loads((tmp_path / 'work' / 'invalid_loss.json').read_text())
    assert report['iteration'] == 6
    assert len(report['images']) == 2
    assert all(Path(each).is_file() for each in report['images'])
    student, teacher = (report['layers'][name]['neck'] for name in ('student', 'teacher'))
    assert len(student) == len(teacher) == 3
    assert all(level['invalid'] > 0 for level in student)  # after a step with such gradients
    assert all(level['invalid'] == 0 and level['least'] < level['most'] for level in teacher)
    last, warnings = latest_checkpoint(tmp_path / 'work')
    assert last.name == 'iter_4.pth'  # the sixth was not written
    assert warnings == []
    assert not (tmp_path / 'work' / 'iter_6.pth').exists()


@pytest.mark.slow
def test_an_invalid_loss_of_one_process_stops_all(tmp_path):
    path = build(tmp_path, dict(type='test_faults.Poison', iteration=5, layer='bbox_head.retina_reg', rank=1))
    for printed in train_together(path, 2, expect=1):
        assert 'error: iteration 5, process 1: loss_bbox[0] is nan' in printed


@pytest.mark.slow
def test_steps_without_finite_gradients_are_left_out(tmp_path, monkeypatch):
    hooks = [
        dict(type='test_faults.Poison', iteration=3, layer='bbox_head.retina_reg', once=True),
        dict(type='mmkd.hosts.hooks.StopAtInvalidLoss', skip=1),
    ]
    printed = tool('train', build(tmp_path, *hooks))
    assert 'iteration 3: losses or gradients are not finite, the step is left out (1 in a row; images ' in printed
    state = torch.load(tmp_path / 'work' / 'iter_8.pth', weights_only=True)['state_dict']
    assert all(torch.isfinite(value).all() for value in state.values())
    hooks[0]['once'] = False
    other = tmp_path / 'other'
    other.mkdir()
    assert 'iteration 4, process 0: loss_bbox' in line(tool('train', build(other, *hooks), expect=1))


@pytest.mark.parametrize('workers', [0, 2])
def test_an_image_that_cannot_be_read_is_named(tmp_path, workers):
    path = build(tmp_path, dict(type='test_faults.BreakImages'), num_workers=workers)
    shutil.copytree(tmp_path / 'shapes' / 'train', tmp_path / 'kept')
    last = line(tool('train', path, expect=1))
    assert f'error: sample {tmp_path}/shapes/train/' in last
    assert ' cannot be used: ' in last
    if workers:  # all images are broken by then, and a data set tries a thousand others
        shutil.copytree(tmp_path / 'kept', tmp_path / 'shapes' / 'train', dirs_exist_ok=True)
        printed = tool('train', path, '--leave-out', 2, '--work-dir', tmp_path / 'two', expect=1)
        assert printed.count('; it is left out') == 2
        assert 'cannot be used: ' in printed.strip().splitlines()[-1]


def test_a_full_disk(tmp_path):
    path = build(tmp_path, dict(type='test_faults.FileLimit'))
    last = line(tool('train', path, expect=1))
    assert (
        f'iteration 4: checkpoint {tmp_path}/work/iter_4.pth could not be written ([Errno 27] File too large)' in last
    )
    assert latest_checkpoint(tmp_path / 'work') == (tmp_path / 'work' / 'iter_2.pth', [])
    assert not list((tmp_path / 'work').glob('.*'))
    tool('train', path, '--resume', '--cfg-options', 'custom_hooks=None')


def test_a_data_worker_that_is_killed(tmp_path):
    path = build(tmp_path, dict(type='test_faults.KillWorker'), num_workers=2)
    printed = tool('train', path, expect=1)
    assert 'DataLoader worker' in printed.splitlines()[-1]
    assert latest_checkpoint(tmp_path / 'work')[0].name == 'iter_2.pth'


def test_a_teacher_with_nan_is_refused_before_the_first_iteration(tmp_path):
    path = build(tmp_path)
    teacher = torch.load(tmp_path / 'teacher.pth', weights_only=True)
    weights = teacher.get('state_dict', teacher)
    weights['neck.lateral_convs.0.conv.weight'][0] = float('nan')
    torch.save(teacher, tmp_path / 'teacher.pth')
    last = line(tool('train', path, expect=1))
    assert 'teacher.pth: neck.lateral_convs.0.conv.weight holds NaN' in last


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(model=dict(distillers=dict(gid=dict(type='GID')))), 'weights differ, distillers.gid.'),
        (dict(model=dict(student=dict(bbox_head=dict(num_classes=5)))), 'num_classes=5'),
        (
            dict(optim_wrapper=dict(optimizer=dict(_delete_=True, type='Adam', lr=0.001))),
            'its optimizer has the options',
        ),
        (
            dict(optim_wrapper=dict(paramwise_cfg=dict(bias_decay_mult=0.0))),
            'its optimizer has 1 groups of .* parameters, and this one',
        ),
    ],
)
def test_the_state_of_another_training_is_refused(tmp_path, trained, change, message):
    folder, path = trained
    changed = tmp_path / 'changed.py'
    changed.write_text(f"_base_ = '{path}'\n" + '\n'.join(f'{key} = {value!r}' for key, value in change.items()))
    last = line(tool('train', changed, '--work-dir', folder / 'work', '--resume', expect=1))
    assert message.partition('.*')[0] in last


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp('trained')
    path = build(folder)
    tool('train', path, '--cfg-options', 'train_cfg.max_iters=2')
    return folder, path


def test_resuming_weights_alone_or_nothing(tmp_path, trained):
    _, path = trained
    weights = models.save_weights(detectors.retinanet(classes=6), tmp_path / 'weights.pth')
    last = line(tool('train', path, '--work-dir', tmp_path / 'a', '--resume', weights, expect=1))
    assert 'holds weights but no state of a training' in last
    assert f'--cfg-options load_from={weights}' in last
    last = line(tool('train', path, '--work-dir', tmp_path / 'a', '--resume', tmp_path / 'none.pth', expect=1))
    assert f'--resume {tmp_path}/none.pth: no such file' in last
    printed = tool('train', path, '--work-dir', tmp_path / 'b', '--resume', '--cfg-options', 'train_cfg.max_iters=1')
    assert f'--resume: {tmp_path}/b has no checkpoint; the training begins anew.' in printed


def test_the_line_of_an_error_in_a_data_worker():
    error = RuntimeError('Caught Stopped in DataLoader worker process 0.\nOriginal Traceback:\n  x\nmmkd.Stopped: a: b')
    assert first_line(error) == 'a: b'
