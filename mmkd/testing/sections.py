"""What :file:`tools/gpu.py` runs: sections of cases, on a GPU or, as a dry run, on a CPU.

A section is a generator of cases, each a name and a function that returns a :class:`Finding`. What it says in its docstring
stands above its table in the report.
"""

import argparse
import contextlib
import copy
import gc
import json
import logging
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import mmcv
import mmdet
import mmengine
import mmseg
import torch
from mmcv import ops
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
from mmengine.config import Config
from mmengine.registry import DefaultScope

import mmkd
from mmkd.data import shapes, streets
from mmkd.distill import distill
from mmkd.hosts.mmengine import config_path
from mmkd.sources import Peer, Teacher
from mmkd.taps import Taps, tensors
from mmkd.testing import detectors, models, segmentors
from mmkd.testing.batches import random_batch
from mmkd.testing.device import NoWaiting, RandomOnCPU
from mmkd.testing.methods import DETECTION, SEGMENTATION
from mmkd.testing.runs import distilled, shapes_config
from mmkd.testing.steps import device_name, measure, networks, steps, timed

ROOT = Path(__file__).parents[2]
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
SEEDS = (11, 12, 13)
"""Of the batches of which the median difference counts: where rounding changes the sign of what a ReLU takes in, or which slot
is chosen, the gradient is another one's, and that is no matter of the device."""
# Relative differences, see `compare`. Values and gradients are those of ten and more layers in float32.
SAME_LOSS, SAME_GRADIENT = 1e-4, 5e-3
# Of a loss under autocast to that in float32: fp16 has 11 bits, bf16 has 8.
CLOSE = {'float16': 0.01, 'bfloat16': 0.05}
SELECTS = ('GID', 'Mimic', 'QuantizationMimic', 'Chen', 'GDetKD')
"""Methods that choose slots or regions by scores, or draw regions: rounding chooses others, so the value is another's."""


class Finding(NamedTuple):
    """What a case found."""

    found: str
    bound: str = ''
    passed: bool | None = True
    """None for a figure that nothing is asked of."""
    figures: dict[str, Any] = {}


class Skip(Exception):
    """A case that this machine, or mmdet itself, cannot run; with the reason."""


class Setting(NamedTuple):
    """Where and how a section runs."""

    device: Any
    quick: bool
    folder: Path
    end: float

    def left(self) -> float:
        """Seconds of the section's time that are left."""
        return self.end - time.monotonic()


Cases = Iterator[tuple[str, Callable[[], Finding]]]

# the machine


def environment(setting: Setting) -> Cases:
    """mmcv's compiled ops on the device, against the CPU."""

    def agrees(run: Callable[[Any], Any]) -> Callable[[], Finding]:
        def check() -> Finding:
            try:
                found = run(setting.device)
            except RuntimeError as error:
                if 'not found' in str(error) or 'not compiled' in str(error):
                    raise Skip(f'missing: {first_line(error)}') from None
                raise
            difference = float((found.cpu() - run(torch.device('cpu'))).abs().max())
            return Finding(f'{difference:.1e}', 'at most 1e-4 from the CPU', difference <= 1e-4)

        return check

    random = torch.Generator().manual_seed(0)
    image, weight = torch.randn(2, 8, 32, 32, generator=random), torch.randn(8, 8, 3, 3, generator=random) / 8
    offset, mask = torch.randn(2, 18, 32, 32, generator=random), torch.rand(2, 9, 32, 32, generator=random)
    rois = torch.tensor([[0, 1.5, 2.5, 20.0, 30.0], [1, 3.0, 4.0, 31.0, 17.0]])
    boxes = torch.rand(200, 4, generator=random) * 50
    boxes[:, 2:] += boxes[:, :2] + 5
    scores = torch.rand(200, generator=random)

    def deformed(device: Any) -> Any:
        return ops.deform_conv2d(*(each.to(device) for each in (image, offset, weight)), 1, 1)

    def modulated(device: Any) -> Any:
        return ops.modulated_deform_conv2d(
            *(each.to(device) for each in (image, offset, mask, weight, torch.zeros(8))), 1, 1
        )

    yield 'roi_align', agrees(lambda device: ops.roi_align(image.to(device), rois.to(device), 7, 1.0, 2, 'avg', True))
    yield 'nms', agrees(lambda device: ops.nms(boxes.to(device), scores.to(device), 0.5)[0])
    yield 'deform_conv2d', agrees(deformed)
    yield 'modulated_deform_conv2d', agrees(modulated)


# every method and source


def method_cases(quick: bool) -> Iterator[tuple[str, dict, dict, dict[str, dict]]]:
    """Name, configs of student and teacher, and distillers: one method each."""
    wanted = ('RetinaNet: gid', 'RetinaNet: mgd', 'Faster R-CNN: mimic', 'PSPNet: cirkd')
    for pair, (student, teacher, methods) in {**DETECTION, **SEGMENTATION}.items():
        wide = teacher(channels=24, base=8 if 'SegFormer' in pair else 12)
        for name, spec in methods.items():
            if not quick or f'{pair}: {name}' in wanted:
                yield f'{pair}: {name}', student(), wide, {name: spec}


def source_cases(quick: bool) -> Iterator[tuple[str, dict, dict, dict]]:
    """Name, the student's config, sources and distillers: one kind of source each."""
    families = {
        'RetinaNet': (detectors.retinanet, dict(type='AT', layer='neck')),
        'PSPNet': (segmentors.pspnet, dict(type='KD')),
    }
    for family, (make, method) in families.items():
        own = dict(type='AT', layer='backbone.layer3', teacher_layer='backbone.layer4')
        kinds = {
            'frozen': (dict(large=dict(config=make(channels=24))), dict(it=dict(method, teacher='large'))),
            'Average': (dict(mean=dict(type='Average', momentum=0.9)), dict(it=dict(method, teacher='mean'))),
            'Peer and Own': (
                dict(peer=dict(type='Peer', config=make(channels=24)), own=dict(type='Own')),
                dict(it=dict(method, teacher='peer'), up=dict(method, teacher='own', learner='peer')),
            ),
            'Own': (dict(own=dict(type='Own')), dict(it=own)),
        }
        for kind, (sources, distillers) in kinds.items():
            if not quick or f'{family} {kind}' == 'RetinaNet Average':
                yield f'{family} of {kind}', make(), sources, distillers


def build(student: dict, teacher: Any, distillers: dict, device: Any) -> Any:
    """A distilled student with the same weights each time, in training; without dropout, and batch norms as in evaluation.

    Masks of dropout are drawn on the device. A batch norm of the few positions that small models have divides by
    differences that are mostly rounding.
    """
    scope = 'mmseg' if student['type'] == 'EncoderDecoder' else 'mmdet'
    with DefaultScope.overwrite_default_scope(scope):
        plain = models.build(student, seed=0)
        if 'backbone' in teacher:
            teacher = models.build(teacher, seed=1)
        torch.manual_seed(2)
        model = distill(student=plain, teacher=teacher, distillers=copy.deepcopy(distillers))
        for source in model.sources.values():
            if isinstance(source, Teacher):
                source.accept_current_weights()
        model.init_weights()
    model.to(device).train()
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
        elif isinstance(module, torch.nn.BatchNorm2d) and module.running_var is not None:
            module.eval()
    return model


def batch_of(model: Any, seed: int = 0) -> dict:
    """A batch on the model's device."""
    shape = (2, 3, 64, 128) if hasattr(model, 'decode_head') else (2, 3, 128, 160)
    return model.data_preprocessor(random_batch(model, shape, 4, seed), True)


def of_distillers(model: Any, losses: dict) -> dict[str, Any]:
    """What distillers and sources add to the losses."""
    names = (*model.distillers, *model.sources)
    return {key: value for key, value in losses.items() if key.startswith(tuple(f'{name}.loss' for name in names))}


def total(losses: dict) -> Any:
    """The sum of losses, some of which are lists of one per level."""
    return sum(sum(value) if isinstance(value, (list, tuple)) else value for value in losses.values())


def prepare(model: Any, number: int = 2, length: float = 0.3) -> Any:
    """Train for some steps, by which memories are filled and averages differ; the model.

    Each step changes the weights by a vector of this length, whatever the scale of the losses.
    """
    for seed in range(number):
        _, gradients = evaluate(model, seed, of_student=True)
        norm = torch.stack([each.double().norm() for each in gradients.values()]).norm()
        names = dict(model.named_parameters())
        with torch.no_grad():
            for name, gradient in gradients.items():
                names[name].sub_(gradient, alpha=length / float(norm))
    return model


def evaluate(model: Any, seed: int, of_student: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
    """The distillation losses of a batch and their gradients; random numbers are drawn on the CPU."""
    torch.manual_seed(seed)
    with RandomOnCPU():
        losses = model(**batch_of(model, seed), mode='loss')
    losses = (
        {key: value for key, value in losses.items() if 'loss' in key} if of_student else of_distillers(model, losses)
    )
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    found = torch.autograd.grad(total(losses), list(trained.values()), allow_unused=True)
    gradients = {name: each for name, each in zip(trained, found) if each is not None}
    return {key: torch.stack(list(flat(value))).sum().detach() for key, value in losses.items()}, gradients


def compare(found: dict[str, Any], expected: dict[str, Any], least: float = 1e-3) -> float:
    """The largest difference of two sets of tensors, each relative to the largest value of its own tensor.

    Tensors whose largest value is below ``least`` times that of all are taken relative to that: they are rounding alone,
    as the gradient of a bias before a batch norm.
    """
    assert found.keys() == expected.keys(), set(found) ^ set(expected)
    largest = {key: float(value.abs().max()) if value.numel() else 0.0 for key, value in expected.items()}
    floor = max(least * max(largest.values(), default=0.0), 1e-12)
    return max(
        (
            float((found[key].cpu().double() - value.cpu().double()).abs().max()) / max(largest[key], floor)
            for key, value in expected.items()
            if value.numel()
        ),
        default=0.0,
    )


def finite(tensors: Any) -> bool:
    return all(bool(each.isfinite().all()) for each in tensors)


def values(setting: Setting) -> Cases:
    """Losses and gradients of every method and kind of source: the device against the CPU, float32 without TF32.

    Median over three batches of the largest difference, relative to each tensor's largest value.
    The dry run has a CPU alone: there it is oneDNN's convolutions against torch's own, which round otherwise.
    """

    def same(student: dict, teacher: Any, distillers: dict) -> Callable[[], Finding]:
        def check() -> Finding:
            exact = prepare(build(student, teacher, distillers, torch.device('cpu')))
            other = build(student, teacher, distillers, setting.device)
            other.load_state_dict(exact.state_dict())
            differences = []
            for seed in SEEDS:
                expected = evaluate(exact, seed)
                with without_tf32() if setting.device.type == 'cuda' else torch.backends.mkldnn.flags(enabled=False):
                    found = evaluate(other, seed)
                if not finite([*found[0].values(), *found[1].values()]):
                    raise ArithmeticError('a loss or a gradient is not finite')
                differences.append([compare(*each) for each in zip(found, expected)])
            loss, gradient = (statistics.median(each) for each in zip(*differences))
            return Finding(
                f'losses {loss:.1e}, gradients {gradient:.1e}',
                f'{SAME_LOSS:g}, {SAME_GRADIENT:g}',
                loss <= SAME_LOSS and gradient <= SAME_GRADIENT,
                dict(differences=differences),
            )

        return check

    for name, *case in (*method_cases(setting.quick), *source_cases(setting.quick)):
        yield name, same(*case)


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def waiting(setting: Setting) -> Cases:
    """Reading sources, distillers and the backward pass of their losses, with every wait for the device an error.

    The backward pass as far as the tapped tensors; behind them is the student's own. Not in it: the student's forward pass
    with mmdet's assigners, samplers and losses; what else of mmdet's waits by itself: the forward pass of a Peer, which is a
    training step, and the RoI extractor that pools a teacher's regions.
    """

    def never_waits(student: dict, teacher: Any, distillers: dict) -> Callable[[], Finding]:
        def check() -> Finding:
            model = build(student, teacher, distillers, setting.device)
            guard, forward, stock = NoWaiting(setting.device), model.distillers.forward, SingleRoIExtractor.forward
            read: list[torch.Tensor] = []
            extractions = 0

            def extract(*args: Any) -> Any:
                nonlocal extractions
                extractions += 1
                with guard.paused():
                    return stock(*args)

            def distill_guarded(own: Taps, knowledge: dict[str, Taps | None], samples: list) -> dict:
                for taps in (own, *filter(None, knowledge.values())):
                    found = [taps.per_call(layer) for layer, calls in taps.calls.items() if calls]
                    read.extend(each for each in tensors(found) if each.requires_grad)
                SingleRoIExtractor.forward = extract
                try:
                    with guard:
                        return forward(own, knowledge, samples)
                finally:
                    SingleRoIExtractor.forward = stock

            def guarded(function: Callable) -> Callable:
                def call(*args: Any) -> Any:
                    with guard:
                        return function(*args)

                return call

            for seed in (0, 1):  # what is made once, and kept, may wait
                evaluate(model, seed)
            # an instance's attribute is called in place of its class's method
            model.distillers.forward = distill_guarded
            peers = [source for source in model.sources.values() if isinstance(source, Peer)]
            for source in set(model.sources.values()) - set(peers):
                source.read = guarded(source.read)
            for seed in (0, 1):
                read.clear()
                losses = model(**batch_of(model, seed), mode='loss')
                of_methods = {key: losses[key] for key in losses if key.startswith(tuple(model.distillers))}
                loss = total({key: value for key, value in of_methods.items() if '.loss' in key})
                with guard:
                    torch.autograd.grad(loss, [*read, *model.distillers.parameters()], allow_unused=True)
            apart = [f"{extractions // 2} calls of mmdet's RoI extractor"] * bool(extractions)
            apart += ["the peer's training step"] * bool(peers)
            return Finding('never waits' + ''.join(f'; apart from {each}' for each in apart), 'no wait')

        return check

    for name, *case in (*method_cases(setting.quick), *source_cases(setting.quick)):
        yield name, never_waits(*case)


def precision(setting: Setting) -> Cases:
    """Losses of every method under autocast, against float32 on the same device; and steps with a gradient scaler."""

    def close(student: dict, teacher: Any, distillers: dict, dtype: str) -> Callable[[], Finding]:
        def check() -> Finding:
            require_plain(student, dtype, setting)
            exact = prepare(build(student, teacher, distillers, setting.device))
            model = build(student, teacher, distillers, setting.device)
            model.load_state_dict(exact.state_dict())
            differences, ok = [], True
            for seed in SEEDS:
                expected, _ = evaluate(exact, seed)
                with torch.autocast(setting.device.type, getattr(torch, dtype)):
                    found, gradients = evaluate(model, seed)
                ok = ok and finite([*found.values(), *gradients.values()])
                differences.append(compare(found, expected))
            difference = statistics.median(differences)
            selects = any(spec['type'] in SELECTS for spec in distillers.values())
            bound = 'finite' if selects else f'finite, {CLOSE[dtype]:g}'
            text = f'losses {difference:.1e}' if ok else 'not finite'
            return Finding(text, bound, ok and (selects or difference <= CLOSE[dtype]), dict(differences=differences))

        return check

    def scaled(student: dict, teacher: Any, distillers: dict) -> Callable[[], Finding]:
        def check() -> Finding:
            require_plain(student, 'float16' if setting.device.type == 'cuda' else 'bfloat16', setting)
            model = build(student, teacher, distillers, setting.device)
            optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
            scaler = torch.amp.GradScaler(setting.device.type)
            before = [each.detach().clone() for each in model.parameters()]
            batch, taken = batch_of(model), 0
            for index in range(5 if setting.quick else 20):
                torch.manual_seed(index)
                with torch.autocast(setting.device.type, torch.float16 if setting.device.type == 'cuda' else None):
                    loss, _ = model.parse_losses(model(**copy.deepcopy(batch), mode='loss'))
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                scale = scaler.get_scale()
                scaler.step(optimizer)
                scaler.update()
                taken += scaler.get_scale() >= scale
            moved = any(not torch.equal(a, b) for a, b in zip(before, model.parameters()))
            ok = moved and taken > 0 and finite(model.parameters())
            return Finding(f'{taken} of {index + 1} steps taken, scale {scaler.get_scale():g}', 'weights change', ok)

        return check

    dtypes = ('bfloat16',) if setting.quick else ('float16', 'bfloat16')
    for name, *case in method_cases(setting.quick):
        for dtype in dtypes:
            yield f'{name}, {dtype}', close(*case, dtype)
    for name, *case in method_cases(setting.quick):
        if name in ('RetinaNet: gid', 'GFL: ld', 'Faster R-CNN: chen', 'PSPNet: skd', 'PSPNet: cirkd'):
            yield f'{name}, GradScaler', scaled(*case)


def require_plain(student: dict, dtype: str, setting: Setting) -> None:
    """Skip where the student alone does not run in this dtype: mmcv's ops do not have all of them."""
    with DefaultScope.overwrite_default_scope('mmseg' if student['type'] == 'EncoderDecoder' else 'mmdet'):
        plain = models.build(student, seed=0).to(setting.device).train()
    try:
        with torch.autocast(setting.device.type, getattr(torch, dtype)):
            plain(**batch_of(plain), mode='loss')
    except RuntimeError as error:
        raise Skip(f'the student alone does not run so: {first_line(error)}') from None


# several processes


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
            train = [str(ROOT / 'tools' / 'train.py'), str(folder / 'config.py'), '--launcher', 'pytorch']
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


def free_port() -> int:
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        return free.getsockname()[1]


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


# time and memory


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


def flat(value: Any) -> Iterator[Any]:
    if isinstance(value, (tuple, list)):
        for each in value:
            yield from flat(each)
    else:
        yield value


# training


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
            options = ['--cfg-options', *length, *each]
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


SECTIONS: dict[str, Callable[[Setting], Cases]] = {
    "mmcv's ops": environment,
    'Values': values,
    'Waiting for the device': waiting,
    'Mixed precision': precision,
    'Processes': processes,
    **{f'Step: {name}': benchmark(name) for name in BENCHMARKS},
    'Training': training,
    'Compiled and captured': faster,
}


# the process that runs them


def run_section(name: str, section: Callable[[Setting], Cases], setting: Setting, emit: Callable[..., None]) -> None:
    """Run a section's cases, each of which becomes a row whatever happens in it."""
    cases, first = section(setting), True
    while True:
        case, start = 'all', time.monotonic()
        try:
            if not first or setting.left() > 0:  # the first one takes the section's preparation
                case, check = next(cases)
            if setting.left() > 0:
                finding = check()
                status = {None: 'figure', True: 'passed', False: 'failed'}[finding.passed]
            else:
                finding, status = Finding('the time was over'), 'not run'
        except StopIteration:
            return
        except Skip as reason:
            finding, status = Finding(str(reason)), 'skipped'
        except Exception as error:  # whatever it is: it is what the report is for
            traceback.print_exc()
            finding, status = Finding(f'{type(error).__name__}: {first_line(error)}'), 'failed'
        finding = finding._replace(found=finding.found.replace('|', '/'))  # in a table
        seconds = round(time.monotonic() - start, 2)
        emit(event='row', section=name, case=case, status=status, seconds=seconds, **finding._asdict())
        if status == 'failed':
            require_device(setting.device)
        if case == 'all':
            return
        first = False


def first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def require_device(device: torch.device) -> None:
    """Exit if an error took the device with it, so that the rest is run in another process."""
    if device.type == 'cuda':
        try:
            torch.cuda.set_sync_debug_mode('default')
            torch.cuda.synchronize()
        except RuntimeError as error:
            print(f'the device is lost: {first_line(error)}', file=sys.stderr)
            sys.exit(3)


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
