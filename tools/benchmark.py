"""Time and peak memory of one training step: plain student, stock teacher, distilled; in turn, in one process.

    python tools/benchmark.py configs/gid_retinanet.py --shape 2 3 256 320 --json gid_retinanet.json

The weights are random: neither data nor checkpoints are needed. "Floor ratio" is the distilled step over the sum of the
plain student's step and the teacher's forward pass as stock mmdet or mmseg runs it, as far as the same layers.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from mmengine.registry import MODELS, init_default_scope
from torch.profiler import ProfilerActivity, profile

from mmkd import cli
from mmkd.hosts.running import run
from mmkd.sources import Teacher, build_sources
from mmkd.testing.batches import random_batch


def training_step(model: torch.nn.Module, data: dict, amp: bool) -> Callable[[], None]:
    """One optimisation step with SGD, as a function."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)
    device = next(model.parameters()).device
    scaler = torch.amp.GradScaler(device.type, enabled=amp and device.type == 'cuda')

    def step() -> None:
        with torch.autocast(device.type, enabled=amp):
            batch = model.data_preprocessor(data, True)
            loss, _ = model.parse_losses(model(**batch, mode='loss'))
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    return step


def teacher_pass(
    models: Sequence[tuple[torch.nn.Module, tuple[str, ...]]], data: dict, amp: bool
) -> Callable[[], None]:
    """The forward passes of stock models in eval mode, each as far as its tapped layers, as a function."""

    @torch.no_grad()
    def step() -> None:
        for model, layers in models:
            with torch.autocast(next(model.parameters()).device.type, enabled=amp):
                batch = model.eval().data_preprocessor(data, False)
                run(model, layers, batch['inputs'], batch['data_samples'])

    return step


def timed(step: Callable[[], None], device: torch.device) -> float:
    """Milliseconds."""
    if device.type == 'cuda':
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device.type == 'cuda':
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def peak_memory(step: Callable[[], None], device: torch.device) -> float:
    """MiB that a step takes on top of what is allocated before it."""
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    now = peak = 0
    events = [each for each in recorded.profiler.kineto_results.events() if each.name() == '[memory]']
    for event in sorted(events, key=lambda each: each.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak / 2**20


def weights(*models: torch.nn.Module) -> float:
    """MiB of parameters and buffers."""
    tensors = [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
    return sum(tensor.nbytes for tensor in tensors) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description='Time and peak memory of one training step.')
    parser.add_argument('config', help='a distilled config')
    parser.add_argument('--shape', type=int, nargs=4, default=(2, 3, 256, 320), metavar=('B', 'C', 'H', 'W'))
    parser.add_argument('--objects', type=int, default=8, help='objects per image')
    parser.add_argument('--rounds', type=int, default=15)
    parser.add_argument('--amp', action='store_true')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--json', type=Path, metavar='FILE', help='write the figures to this file, too')
    cli.add_common_options(parser)
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f'--rounds: expected at least 1, but got {args.rounds}')
    with cli.clear_errors(args.debug):
        config = cli.read_config(args)
        init_default_scope(config.default_scope)
        device = torch.device(args.device)
        # a copy, as mmseg changes what it builds from
        plain = MODELS.build(copy.deepcopy(config.model.student)).to(device)
        sources = build_sources(config.model.teacher, plain)
        stocks = {name: each.model.to(device) for name, each in sources.items() if isinstance(each, Teacher)}
        distilled = MODELS.build(config.model).to(device)
        # the same weights: with others an RPN would propose other regions, of another cost
        distilled.load_state_dict(plain.state_dict(), strict=False)
        teachers = {name: distilled.sources[name] for name in stocks}
        for teacher in teachers.values():
            teacher.accept_current_weights(device)  # random ones, as all models here have
        for model in (plain, *stocks.values(), distilled):
            if getattr(model.data_preprocessor, 'size', None):  # mmseg pads to the size of the config's crops
                model.data_preprocessor.size = tuple(args.shape[2:])
        data = random_batch(plain, tuple(args.shape), args.objects)

    steps = {
        'plain student': training_step(plain.train(), data, args.amp),
        'stock teacher': teacher_pass([(stocks[name], each.layers) for name, each in teachers.items()], data, args.amp),
        'distilled': training_step(distilled.train(), data, args.amp),
    }
    for step in steps.values():
        for _ in range(3):
            step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.rounds):
        for name, step in steps.items():
            times[name].append(timed(step, device))
    # weights, gradients and momentum stay between steps
    resident = {
        'plain student': 3 * weights(plain),
        'stock teacher': sum(map(weights, stocks.values())),
        'distilled': 3 * weights(distilled) + sum(weights(each.model) for each in teachers.values()),
    }
    on = torch.cuda.get_device_name() if device.type == 'cuda' else f'CPU, {torch.get_num_threads()} threads'
    shape = 'x'.join(map(str, args.shape))
    print(f'{args.config} at {shape}{" with AMP" if args.amp else ""}, {on}, torch {torch.__version__}')
    print(f'{"":16}{"ms":>10}{"(min)":>10}{"peak MiB":>12}')
    figures = {}
    for name, step in steps.items():
        of_step = {
            'median_ms': statistics.median(times[name]),
            'min_ms': min(times[name]),
            'peak_mib': resident[name] + peak_memory(step, device),
        }
        print(f'{name:16}{of_step["median_ms"]:10.1f}{of_step["min_ms"]:10.1f}{of_step["peak_mib"]:12.1f}')
        figures[name] = of_step
    floor = statistics.median(d / (p + s) for p, s, d in zip(*times.values(), strict=True))
    memory = figures['distilled']['peak_mib'] / (figures['plain student']['peak_mib'] + resident['stock teacher'])
    print(f'floor ratio      {floor:.3f}  (distilled / (plain student + stock teacher), median)')
    print(f'memory ratio     {memory:.3f}  (distilled / (plain student + teacher weights))')
    if args.json:
        about = {
            'config': args.config,
            'options': dict(args.cfg_options),
            'shape': list(args.shape),
            'objects': args.objects,
            'rounds': args.rounds,
            'amp': args.amp,
            'device': on,
            'torch': torch.__version__,
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(
            json.dumps({**about, 'steps': figures, 'floor_ratio': floor, 'memory_ratio': memory}, indent=2) + '\n'
        )


if __name__ == '__main__':
    main()
