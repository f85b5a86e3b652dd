"""Run sections in this process and append what they find to a file; ``python -m mmkd.testing.gpu``, for tools/gpu.py."""

import argparse
import gc
import json
import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mmcv
import mmdet
import mmengine
import mmseg
import torch
from mmcv import ops

import mmkd
from mmkd.testing.gpu import correctness, speed, trainings
from mmkd.testing.gpu.section import Cases, Setting, run_section
from mmkd.testing.steps import device_name

SECTIONS: dict[str, Callable[[Setting], Cases]] = {
    "mmcv's ops": correctness.environment,
    'Values': correctness.values,
    'Waiting for the device': correctness.waiting,
    'Mixed precision': correctness.precision,
    'Processes': trainings.processes,
    **{f'Step: {name}': speed.benchmark(name) for name in speed.BENCHMARKS},
    'Training': trainings.training,
    'Compiled and captured': speed.faster,
}


def facts(device: torch.device) -> dict[str, Any]:
    """What the figures belong to."""
    packages = (mmkd, torch, mmengine, mmcv, mmdet, mmseg)
    found = {'device': device_name(device), **{each.__name__: each.__version__ for each in packages}}
    if device.type == 'cuda':
        found |= {
            'CUDA': torch.version.cuda,
            'cuDNN': torch.backends.cudnn.version(),
            'compute capability': '.'.join(map(str, torch.cuda.get_device_capability())),
            'memory': f'{torch.cuda.get_device_properties(0).total_memory / 2**30:.0f} GiB',
            'devices': torch.cuda.device_count(),
        }
    return found | {'CUDA of mmcv': ops.get_compiling_cuda_version()}


def main() -> None:
    parser = argparse.ArgumentParser(description='Run sections and append what they find to a file; for tools/gpu.py.')
    parser.add_argument('sections', nargs='+', help='NAME=SECONDS')
    parser.add_argument('--device', type=torch.device, required=True)
    parser.add_argument('--rows', type=Path, required=True)
    parser.add_argument('--seconds', type=float, required=True, help='for all of them')
    parser.add_argument('--quick', action='store_true')
    args = parser.parse_args()
    end = time.monotonic() + args.seconds
    logging.disable(logging.INFO)  # how each weight is initialized

    def emit(**what: Any) -> None:
        with args.rows.open('a') as file:
            file.write(json.dumps(what) + '\n')

    emit(event='facts', facts=facts(args.device))
    for each in args.sections:
        name, _, seconds = each.rpartition('=')
        section = SECTIONS[name]
        emit(event='start', section=name, about=' '.join((section.__doc__ or '').split()))
        with tempfile.TemporaryDirectory() as folder:
            left = min(time.monotonic() + float(seconds), end)
            run_section(name, section, Setting(args.device, args.quick, Path(folder), left), emit)
        gc.collect()
        if args.device.type == 'cuda':
            torch.cuda.empty_cache()
        emit(event='end', section=name)


if __name__ == '__main__':
    main()
