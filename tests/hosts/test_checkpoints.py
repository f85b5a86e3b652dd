"""Checkpoints are whole or not there, and the last whole one is found."""

import os
from pathlib import Path

import pytest
import torch
from mmengine.runner import Runner

from mmkd import cli
from mmkd.errors import ConfigError, Stopped
from mmkd.hosts import checkpoints
from mmkd.hosts.checkpoints import AtomicBackend, SafeCheckpointHook, latest_checkpoint
from mmkd.testing import segmentors
from mmkd.testing.runs import streets_config


def write(path: Path, age: int = 0, **changes) -> Path:
    """A checkpoint of a training, ``age`` seconds old."""
    content = dict(meta=dict(epoch=0, iter=4), state_dict={'a': torch.zeros(2)}, optimizer={}, message_hub={})
    torch.save({key: value for key, value in {**content, **changes}.items() if value is not None}, path)
    when = path.stat().st_mtime - age
    os.utime(path, (when, when))
    return path


def test_a_file_is_the_old_or_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / 'file'
    AtomicBackend().put(b'old', path)
    assert path.read_bytes() == b'old'

    def fail(number):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(checkpoints.os, 'fsync', fail)
    with pytest.raises(OSError, match='No space'):
        AtomicBackend().put(b'new', path)
    assert path.read_bytes() == b'old'
    assert [each.name for each in tmp_path.iterdir()] == ['file']


def runner_of(tmp_path, **options):
    config = streets_config(tmp_path, segmentors.pspnet(), iterations=6, batch=2)
    config.default_hooks.checkpoint.update(interval=2, **options)
    config.experiment_name = f'{tmp_path.name}{len(options)}'
    config.launcher = 'none'
    runner = cli.build_runner(config)
    cli.watch(runner)
    return runner


def hook_of(runner: Runner) -> SafeCheckpointHook:
    (hook,) = (each for each in runner.hooks if isinstance(each, SafeCheckpointHook))
    return hook


def test_old_ones_are_removed_when_the_next_is_there(tmp_path, monkeypatch):
    runner = runner_of(tmp_path, max_keep_ckpts=1)
    work = Path(runner.work_dir)
    seen, stock = [], SafeCheckpointHook._remove

    def remove(hook, path):
        seen.append((sorted(each.name for each in work.glob('*.pth')), (work / 'last_checkpoint').read_text()))
        stock(hook, path)

    monkeypatch.setattr(SafeCheckpointHook, '_remove', remove)
    runner.train()
    assert (['iter_2.pth', 'iter_4.pth'], str(work / 'iter_4.pth')) in seen
    assert sorted(each.name for each in work.glob('*.pth')) == ['iter_6.pth']
    resumed = torch.load(work / 'iter_6.pth', weights_only=True)
    assert resumed['message_hub']['runtime_info']['keep_ckpt_ids'] == [6]


def test_the_best_one_is_removed_when_a_better_is_there(tmp_path, monkeypatch):
    runner = runner_of(tmp_path, save_best='mIoU', rule='greater')
    work, there = Path(runner.work_dir), []
    hook = hook_of(runner)
    stock = AtomicBackend.remove
    monkeypatch.setattr(
        AtomicBackend, 'remove', lambda self, path: (there.append(sorted(work.glob('best*'))), stock(self, path))
    )
    runner.train()
    for iteration, score in ((10, 201.0), (11, 202.0), (12, 201.5)):
        runner.train_loop._iter = iteration
        hook._save_best_checkpoint(runner, dict(mIoU=score))
    assert [each.name for each in work.glob('best*')] == ['best_mIoU_iter_11.pth']
    assert max(map(len, there)) == 2


def test_a_full_disk_stops_with_one_line_and_damages_nothing(tmp_path, monkeypatch):
    runner = runner_of(tmp_path)
    work, stock = Path(runner.work_dir), AtomicBackend.put

    def put(self, content, path):
        if 'iter_4' in str(path):
            raise OSError(28, 'No space left on device')
        stock(self, content, path)

    monkeypatch.setattr(AtomicBackend, 'put', put)
    message = r'^iteration 4: checkpoint .*/iter_4.pth could not be written \(.*No space left on device\); .*--resume$'
    with pytest.raises(Stopped, match=message):
        runner.train()
    assert latest_checkpoint(work) == (work / 'iter_2.pth', [])


def test_the_last_one_that_can_be_read_is_found(tmp_path):
    assert latest_checkpoint(tmp_path) == (None, [])
    first = write(tmp_path / 'iter_2.pth', age=20)
    second = write(tmp_path / 'iter_4.pth', age=10)
    write(tmp_path / 'best_x_iter_4.pth')
    record = tmp_path / 'last_checkpoint'
    record.write_text(f'{second}\n')
    assert latest_checkpoint(tmp_path) == (second, [])
    record.write_text(f'/moved/{first.name}')
    assert latest_checkpoint(tmp_path) == (first, [])
    for text in ('', '\0\0\0', '/nowhere/iter_9.pth', 'garbage \x00\xff'):
        record.write_text(text)
        assert latest_checkpoint(tmp_path) == (second, [f'{record} names no checkpoint that is there.'])
    record.unlink()
    assert latest_checkpoint(tmp_path) == (second, [])


@pytest.mark.parametrize('damage', ['empty', 'half', 'flipped', 'weights alone', 'zeros'])
def test_a_damaged_one_is_passed_over_with_a_warning(tmp_path, damage):
    first = write(tmp_path / 'iter_2.pth', age=20)
    second = write(tmp_path / 'iter_4.pth', optimizer=None if damage == 'weights alone' else {})
    (tmp_path / 'last_checkpoint').write_text(str(second))
    content = bytearray(second.read_bytes())
    if damage == 'empty':
        content = b''
    elif damage == 'half':
        content = content[: len(content) // 2]
    elif damage == 'flipped':
        start = content.index(b'state_dict')
        content[start] ^= 0xFF
    elif damage == 'zeros':
        content = bytes(len(content))
    second.write_bytes(content)
    found, warnings = latest_checkpoint(tmp_path)
    assert found == first
    assert len(warnings) == 1
    assert str(second) in warnings[0]
    assert warnings[0].endswith('; it is passed over.')
    first.unlink()
    with pytest.raises(ConfigError, match=f'^--resume: {tmp_path} has no checkpoint that can be read; .*{second}'):
        latest_checkpoint(tmp_path)
