"""Trainings by tools/train.py: in several processes, and longer ones on generated data."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope

from mmkd.data import shapes, streets
from mmkd.hosts.mmengine import config_path
from mmkd.testing import models
from mmkd.testing.gpu.cases import finite
from mmkd.testing.gpu.section import Cases, Finding, Setting, Skip
from mmkd.testing.runs import distilled, shapes_config

ROOT = Path(__file__).parents[3]


def processes(setting: Setting) -> Cases:
    """DDP, and a sharded student, over NCCL (gloo on a CPU) by tools/train.py: they start, and end with the same weights."""

    def together(number: int, sharded: bool = False) -> Callable[[], Finding]:
        def check() -> Finding:
            if setting.device.type == 'cuda' and torch.cuda.device_count() < number:
                raise Skip(f'there is {torch.cuda.device_count()} GPU')
            folder = setting.folder / f'{number}_{sharded}'
            folder.mkdir()
            methods = dict(gid=dict(type='GID'), cwd=dict(type='CWD', layer='neck'))
            config = shapes_config(folder, distilled(folder, methods), iterations=4, batch=2, images=8)
            if sharded:
                config.update(runner_type='FlexibleRunner', strategy=dict(type='mmkd.ShardedStrategy'))
            else:
                config.custom_hooks = [dict(type='mmkd.testing.runs.SaveEachRank')]
            config.dump(folder / 'config.py')
            torchrun = ['-m', 'torch.distributed.run', f'--nproc_per_node={number}', f'--master_port={free_port()}']
            train = [str(ROOT / 'tools' / 'train.py'), str(folder / 'config.py'), '--launcher', 'pytorch', '--no-check']
            call([*torchrun, *train], folder, setting)
            saved = torch.load(folder / 'work' / 'iter_4.pth', map_location='cpu', weights_only=True)['state_dict']
            if not finite(value.float() for value in saved.values()):
                raise ArithmeticError('a weight is not finite')
            if sharded:
                names = models.build(config.model.student).state_dict().keys()
                return Finding('trained, plain checkpoint', 'plain names', names <= saved.keys())
            weights = [torch.load(folder / 'work' / f'rank{rank}.pth', map_location='cpu') for rank in range(number)]
            before = torch.load(folder / 'work' / 'rank0_before.pth', map_location='cpu')
            moved = any(not torch.equal(value, before[name]) for name, value in saved.items())
            equal = all(torch.equal(value, each[name]) for each in weights for name, value in saved.items())
            return Finding(f'weights moved: {moved}, equal: {equal}', 'moved and equal', moved and equal)

        return check

    yield 'one process', together(1)
    if not setting.quick:
        yield 'two processes', together(2)
        yield 'one process, sharded', together(1, sharded=True)
        yield 'two processes, sharded', together(2, sharded=True)


def training(setting: Setting) -> Cases:
    """Teacher and student of generated data by tools/train.py, with AMP on a GPU, as long as time allows."""

    def trained(data: Callable[[], Any], kind: str, teacher: str, student: str) -> Callable[[], Finding]:
        def check() -> Finding:
            data()
            number = 4 if setting.quick else 300
            amp = ['--amp'] if setting.device.type == 'cuda' else []
            length = [f'train_cfg.max_iters={number}', f'train_cfg.val_interval={number}', 'randomness.seed=0']
            each = ['default_hooks.logger.interval=1', 'log_processor.window_size=1']
            folder = setting.folder / kind
            folder.mkdir()
            (folder / 'data').symlink_to(setting.folder / 'data')
            options = [*(['--no-check'] if setting.quick else []), '--cfg-options', *length, *each]
            if setting.quick:
                options += ['train_dataloader.batch_size=2']
            train = str(ROOT / 'tools' / 'train.py')
            if setting.quick:  # a teacher that has learnt nothing
                config = Config.fromfile(config_path(f'mmkd::{kind}/{teacher}.py'))
                with DefaultScope.overwrite_default_scope(config.default_scope):
                    weights = models.save_weights(config.model, folder / 'teacher.pth')
            else:
                call([train, f'mmkd::{kind}/{teacher}.py', *amp, *options], folder, setting)
                weights = f'work_dirs/{teacher}/iter_{number}.pth'
            start = time.monotonic()
            call(
                [train, f'mmkd::{kind}/{student}.py', *amp, *options, f'model.teacher.checkpoint={weights}'],
                folder,
                setting,
            )
            seconds = time.monotonic() - start
            logs, metric = logged(folder / 'work_dirs' / student)
            losses = [step['loss'] for step in logs]
            ok = len(losses) == number and all(value == value and abs(value) < 1e6 for value in losses)
            tenth = max(number // 10, 1)
            first, last = (sum(part) / tenth for part in (losses[:tenth], losses[-tenth:]))
            rate = sum(step['time'] for step in logs[-tenth:]) / tenth
            return Finding(
                f'{number} iterations, loss {first:.3f} to {last:.3f}, {metric}, {1e3 * rate:.0f} ms an iteration',
                'finite' if setting.quick else 'finite, falls',
                ok and (setting.quick or last < first),
                dict(first=first, last=last, seconds=seconds, metric=metric),
            )

        return check

    number = 8 if setting.quick else 400
    data = setting.folder / 'data'
    yield (
        'shapes: gid_retinanet',
        trained(
            lambda: shapes.generate(data / 'shapes', splits={'train': number, 'val': max(number // 8, 4)}),
            'shapes',
            'retinanet_teacher',
            'gid_retinanet',
        ),
    )
    if not setting.quick:
        yield (
            'streets: cwd_pspnet',
            trained(
                lambda: streets.generate(data / 'streets', {'train': number, 'val': max(number // 8, 4)}),
                'streets',
                'pspnet_teacher',
                'cwd_pspnet',
            ),
        )


def logged(folder: Path) -> tuple[list[dict], str]:
    """What each training iteration logged, and the metric of the last evaluation."""
    (file,) = folder.glob('*/vis_data/scalars.json')
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    scores = [f'{key.split("/")[-1]} {line[key]}' for line in lines for key in ('coco/bbox_mAP', 'mIoU') if key in line]
    return [line for line in lines if 'loss' in line], scores[-1] if scores else 'nothing found'


def call(arguments: list[str], folder: Path, setting: Setting) -> str:
    """Run Python with these arguments; what it printed.

    Raises:
        RuntimeError: with its last line, if it fails or takes longer than the section has.
    """
    env = environment_with_mmkd()
    if setting.device.type != 'cuda':
        env['CUDA_VISIBLE_DEVICES'] = ''
    process = subprocess.Popen(
        [sys.executable, '-W', 'ignore', *arguments],
        cwd=folder,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        printed, _ = process.communicate(timeout=max(setting.left(), 1.0))
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends what it has started
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=10)
        process.kill()
        raise RuntimeError(f'{Path(arguments[0]).name} took longer than the section has') from None
    if process.returncode:
        print(printed[-5000:], file=sys.stderr)
        last = [line for line in printed.splitlines() if line.strip()][-1:]
        raise RuntimeError(f'exit status {process.returncode}: {"".join(last)}')
    return printed


def environment_with_mmkd() -> dict[str, str]:
    """The environment's variables, for a process that imports mmkd from here."""
    path = [str(ROOT), *filter(None, [os.environ.get('PYTHONPATH')])]
    return {**os.environ, 'PYTHONPATH': os.pathsep.join(path)}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        return free.getsockname()[1]
