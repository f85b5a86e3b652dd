"""Time and peak memory of one training step of a distilled model, beside its floor: plain student and stock teacher."""

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import MODELS, init_default_scope
from torch import nn
from torch.profiler import ProfilerActivity, profile

from mmkd.hosts.running import run
from mmkd.sources import Peer, build_sources
from mmkd.testing.batches import random_batch

Step = Callable[[], None]


class Networks(NamedTuple):
    """What is compared, with random weights: neither data nor checkpoints are needed."""

    plain: nn.Module
    """The student alone."""
    stocks: dict[str, nn.Module]
    """Each teacher as mmdet or mmseg builds it; an average of the student as well."""
    peers: dict[str, nn.Module]
    """Each model that is trained along, as mmdet or mmseg builds it."""
    distilled: nn.Module
    """The student with the plain one's weights, its teachers as mmkd runs them, and the distillers."""
    data: dict[str, list]
    """A random batch, as a data loader yields it."""


def networks(config: Config, shape: tuple[int, int, int, int], objects: int, device: torch.device) -> Networks:
    """Build what is compared from a distilled config.

    Args:
        config: A distilled config; it stays as it is.
        shape: Of the batch, (B, 3, H, W).
        objects: Per image.
        device: Where the models go.
    """
    init_default_scope(config.default_scope)
    config = copy.deepcopy(config)
    # a copy, as mmseg changes what it builds from
    plain = MODELS.build(copy.deepcopy(config.model.student)).to(device)
    sources = build_sources(config.model.teacher, plain)
    others = {
        name: each for name, each in sources.items() if isinstance(each.model, BaseModel) and each.model is not plain
    }
    peers = {name: each.model.to(device).train() for name, each in others.items() if isinstance(each, Peer)}
    stocks = {name: each.model.to(device) for name, each in others.items() if name not in peers}
    distilled = MODELS.build(config.model).to(device)
    # the same weights: with others an RPN would propose other regions, of another cost
    distilled.load_state_dict(plain.state_dict(), strict=False)
    for source in distilled.sources.values():
        if source.frozen:
            source.accept_current_weights(device)  # random ones, as all models here have
    kept = [distilled.sources[name].model for name in peers]
    for model in (plain, *stocks.values(), *peers.values(), *kept, distilled):
        if getattr(model.data_preprocessor, 'size', None):  # mmseg pads to the size of the config's crops
            model.data_preprocessor.size = tuple(shape[2:])
    return Networks(plain.train(), stocks, peers, distilled.train(), random_batch(plain, shape, objects))


def steps(of: Networks, amp: bool) -> dict[str, Step]:
    """One step of each: the plain student's, the stock teachers' pass, each plain peer's, the distilled student's."""
    teachers = [(stock, of.distilled.sources[name].layers) for name, stock in of.stocks.items()]
    return {
        'plain student': training_step(of.plain, of.data, amp),
        'stock teacher': teacher_pass(teachers, of.data, amp),
        **{name: training_step(peer, of.data, amp) for name, peer in of.peers.items()},
        'distilled': training_step(of.distilled, of.data, amp),
    }


def training_step(model: nn.Module, data: dict, amp: bool) -> Step:
    """One optimisation step with SGD, as a function."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)
    device = next(model.parameters()).device
    kind = getattr(torch.amp, 'GradScaler', torch.cuda.amp.GradScaler)  # the latter before torch 2.3
    scaler = kind(enabled=amp and device.type == 'cuda')

    def step() -> None:
        with torch.autocast(device.type, enabled=amp):
            batch = model.data_preprocessor(data, True)
            loss, _ = model.parse_losses(model(**batch, mode='loss'))
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    return step


def teacher_pass(models: Sequence[tuple[nn.Module, tuple[str, ...]]], data: dict, amp: bool) -> Step:
    """The forward passes of stock models in eval mode, each as far as its tapped layers, as a function."""

    @torch.no_grad()
    def step() -> None:
        for model, layers in models:
            with torch.autocast(next(model.parameters()).device.type, enabled=amp):
                batch = model.eval().data_preprocessor(data, False)
                run(model, layers, batch['inputs'], batch['data_samples'])

    return step


def measure(
    of: Networks,
    of_steps: Mapping[str, Step],
    device: torch.device,
    rounds: int,
    seconds: float | None = None,
    warm_up: int = 3,
) -> dict[str, Any]:
    """Run the steps in turn and compare them.

    Args:
        of: The networks, for the memory that stays between steps.
        of_steps: What :func:`steps` made.
        device: Where they run.
        rounds: How often.
        seconds: End after the round in which so much time is over; there is one round at least. None: never.
        warm_up: Steps of each before the first round.

    Returns:
        ``steps``: median and least time in ms and peak memory in MiB of each; ``rounds``; ``floor_ratio``, the median of the
        distilled step over the sum of the others; ``memory_ratio``, the distilled step's peak over the sum of the plain
        student's, the peers' and the teachers' weights.
    """
    for step in of_steps.values():
        for _ in range(warm_up):
            step()
    times: dict[str, list[float]] = {name: [] for name in of_steps}
    start = time.perf_counter()
    for _ in range(rounds):
        for name, step in of_steps.items():
            times[name].append(timed(step, device))
        if seconds is not None and time.perf_counter() - start > seconds:
            break
    teachers = [
        each.model for each in of.distilled.sources.values() if each.kept is None and each.model is not of.distilled
    ]
    resident = {
        'plain student': trained(of.plain),
        'stock teacher': weights(*of.stocks.values()),
        **{name: trained(peer) for name, peer in of.peers.items()},
        'distilled': trained(of.distilled) + weights(*teachers),
    }
    figures = {
        name: {
            'median_ms': statistics.median(times[name]),
            'min_ms': min(times[name]),
            'peak_mib': resident[name] + peak_memory(step, device),
        }
        for name, step in of_steps.items()
    }
    floor = statistics.median(each[-1] / sum(each[:-1]) for each in zip(*times.values(), strict=True))
    beside = sum(figures[name]['peak_mib'] for name in ('plain student', *of.peers))
    memory = figures['distilled']['peak_mib'] / (beside + resident['stock teacher'])
    rounds = len(times['distilled'])
    return {'steps': figures, 'rounds': rounds, 'floor_ratio': floor, 'memory_ratio': memory}


def timed(step: Step, device: torch.device) -> float:
    """Milliseconds."""
    if device.type == 'cuda':
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device.type == 'cuda':
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def peak_memory(step: Step, device: torch.device) -> float:
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


def trained(model: nn.Module) -> float:
    """MiB that stay between the steps of a training: weights, and gradients and momentum of what is trained."""
    return weights(model) + 2 * sum(each.nbytes for each in model.parameters() if each.requires_grad) / 2**20


def weights(*models: nn.Module) -> float:
    """MiB of parameters and buffers."""
    tensors = [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
    return sum(tensor.nbytes for tensor in tensors) / 2**20


def device_name(device: torch.device) -> str:
    """What the figures belong to."""
    return torch.cuda.get_device_name() if device.type == 'cuda' else f'CPU, {torch.get_num_threads()} threads'
