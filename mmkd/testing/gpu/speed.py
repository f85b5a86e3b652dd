"""Time and memory of a training step against the floor."""

import shutil
from collections.abc import Callable
from typing import Any

import torch
from mmengine.config import Config

from mmkd.hosts.mmengine import config_path
from mmkd.testing import detectors
from mmkd.testing.gpu.cases import flat
from mmkd.testing.gpu.section import Cases, Finding, Setting, Skip
from mmkd.testing.runs import distilled
from mmkd.testing.steps import measure, networks, steps, timed

BENCHMARKS = {
    'gid_retinanet': (2, 3, 800, 1344),
    'cwd_retinanet': (2, 3, 800, 1344),
    'gid_faster_rcnn': (2, 3, 800, 1344),
    'mimic_faster_rcnn': (2, 3, 800, 1344),
    'gid_gfl': (2, 3, 800, 1344),
    'cwd_pspnet': (2, 3, 512, 1024),
    'dist_deeplabv3': (2, 3, 512, 1024),
}
GOAL = {True: 1.05, False: 0.95}
"""Of the floor ratio with AMP: with GID, and with the others."""


def benchmark(name: str) -> Callable[[Setting], Cases]:
    """A section that measures one config's step against the floor."""

    def section(setting: Setting) -> Cases:
        built = benchmark_networks(name, setting)
        teachers = [built.distilled.sources[each] for each in built.stocks]
        rounds, seconds, warm_up = (1, 1.0, 1) if setting.quick else (15, 4.0, 3)

        def case(amp: bool, dtype: str | None) -> Callable[[], Finding]:
            def check() -> Finding:
                for teacher in teachers:
                    teacher.dtype = getattr(torch, dtype) if dtype else None
                found = measure(built, steps(built, amp), setting.device, rounds, seconds, warm_up)
                goal = GOAL['gid' in name]
                met = 'met' if found['floor_ratio'] <= goal else 'not met'
                text = '{} ms'.format(' + '.join(f'{of["median_ms"]:.1f}' for of in list(found['steps'].values())[:2]))
                step = found['steps']['distilled']
                return Finding(
                    f'{step["median_ms"]:.1f} ms for {text}: **{found["floor_ratio"]:.3f}**; peak {step["peak_mib"]:.0f} MiB, '
                    f'memory ratio {found["memory_ratio"]:.3f}',
                    f'goal {goal:g}: {met}' if amp and setting.device.type == 'cuda' else '',
                    None,
                    found,
                )

            return check

        half = 'float16' if setting.device.type == 'cuda' else 'bfloat16'
        yield 'AMP', case(True, None)
        if not setting.quick:
            yield 'float32', case(False, None)
            yield f'float32, teacher in {half}', case(False, half)

    section.__doc__ = f"""One training step of configs/{name}.py over the plain student's step and the stock teacher's pass.

    Student + teacher in ms for the distilled step in ms, medians of rounds in turn, random weights, 8 objects an image.
    "float32" is as torch has it: convolutions in TF32, matrix products not.
    """
    return section


def benchmark_networks(name: str, setting: Setting) -> Any:
    """A config's networks; for the dry run small ones of the same kind."""
    if setting.quick:
        model = distilled(setting.folder, dict(gid=dict(type='GID')), detectors.retinanet(classes=6))
        config, shape = Config(dict(model=model, default_scope='mmdet')), (2, 3, 64, 96)
    else:
        config, shape = Config.fromfile(config_path(f'mmkd::{name}.py')), BENCHMARKS[name]
        if setting.device.type != 'cuda':
            shape = (2, 3, shape[2] // 4, shape[3] // 4)
    return networks(config, shape, 8, setting.device)


def faster(setting: Setting) -> Cases:
    """torch.compile of backbone and neck, and a CUDA graph of the teacher's pass, for configs/gid_retinanet.py with AMP.

    A whole step cannot be one CUDA graph: mmdet's assigners read from the device how many objects and positive anchors
    there are, and batches differ in size. A graph of the teacher is of one size of images.
    """
    built = benchmark_networks('gid_retinanet', setting)
    teacher = built.distilled.sources['teacher']
    rounds, seconds, warm_up = (1, 1.0, 1) if setting.quick else (15, 4.0, 4)
    backend = 'eager' if setting.device.type == 'cpu' else 'inductor'

    def compiled(*models: Any) -> Callable[[], Finding]:
        def check() -> Finding:
            if backend == 'inductor' and not any(map(shutil.which, ('cc', 'gcc', 'clang'))):
                raise Skip('torch.compile needs a C compiler')
            for model in models:
                for part in (model.backbone, model.neck):
                    # `forward`: the taps' hooks stay outside of what is compiled
                    part.forward = torch.compile(type(part).forward.__get__(part), backend=backend)
            found = measure(built, steps(built, True), setting.device, rounds, seconds, warm_up)
            step = found['steps']['distilled']
            return Finding(
                f'{step["median_ms"]:.1f} ms: **{found["floor_ratio"]:.3f}** of the floor that is not compiled',
                '',
                None,
                found,
            )

        return check

    def graph() -> Finding:
        if setting.device.type != 'cuda':
            raise Skip('a CPU has no CUDA graphs')
        batch = built.distilled.data_preprocessor(built.data, True)
        inputs, samples = batch['inputs'], batch['data_samples']

        def read() -> Any:
            # casts that autocast keeps would not be in the graph
            with torch.autocast('cuda', cache_enabled=False):
                return teacher(inputs, samples)

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                read()
        torch.cuda.current_stream().wait_stream(stream)
        eager = min(timed(read, setting.device) for _ in range(rounds))
        expected = read()
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            taps = read()
        replayed = min(timed(captured.replay, setting.device) for _ in range(rounds))
        difference = max(
            float((a - b).abs().max() / b.abs().max().clamp(min=1e-12))
            for layer in expected
            for a, b in zip(flat(taps[layer]), flat(expected[layer]))
        )
        return Finding(f'{replayed:.1f} ms for {eager:.1f} ms', 'the same taps to 1e-2', difference <= 1e-2)

    yield "CUDA graph of the teacher's pass", graph
    yield 'teacher compiled', compiled(teacher.model)
    yield 'teacher and student compiled', compiled(built.distilled)
