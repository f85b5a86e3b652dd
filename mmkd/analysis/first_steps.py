"""The first steps of a distillation, without training: each loss, how strongly it pulls, and what a step takes."""

import copy
import itertools
import os
import resource
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from mmengine.config import Config, ConfigDict
from mmengine.device import get_device
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import DataLoader

from mmkd.analysis.gradients import FAR_OFF, TASK, figures_of, gradients_of, norm, of_backbone
from mmkd.analysis.scores import silent
from mmkd.errors import ConfigError
from mmkd.hosts.datasets import without_workers
from mmkd.testing.steps import training_step

OPTIMIZER = ('optimizer', 'paramwise_cfg', 'constructor', 'clip_grad')
"""What a warm-up takes of ``optim_wrapper``."""


class Term(NamedTuple):
    """One loss over a few batches.

    Attributes:
        name: Its key in the log; ``'task'`` is the sum of the student's own losses.
        value: Median of its values; they are weighted.
        share: Median of its gradient's share of the sum of all losses' norms at the backbone, 0 to 1.
        cosine: Median of the cosine to the task's gradient.
        times: How many times the task's gradient its own is.
    """

    name: str
    value: float
    share: float
    cosine: float
    times: float

    @property
    def advice(self) -> str:
        """What to do where it is far off; '' else."""
        if self.name == TASK or 1 / FAR_OFF <= self.times <= FAR_OFF:
            return ''
        if self.times == 0:
            return (
                'it has no gradient at the backbone: its weight is 0, what it reads is frozen, or both networks are equal, as '
                'an average is at first'
            )
        direction = 'above' if self.times > 1 else 'below'
        factor = float(f'{1 / self.times:.2g}')
        return f'far {direction} the task: a weight {factor:g} times as large would pull as strongly as the task'


def build(config: Config) -> nn.Module:
    """The distilled model as a training begins with it, on the device that is there."""
    init_default_scope(config.get('default_scope', 'mmengine'))
    spec = copy.deepcopy(config.model)
    if config.get('data_preprocessor') and 'data_preprocessor' not in spec:  # as the Runner does
        spec.data_preprocessor = copy.deepcopy(config.data_preprocessor)
    model = MODELS.build(spec).to(get_device())
    model.init_weights()
    return model.train()


def batches(config: Config, number: int) -> list[dict]:
    """The first batches of the training data, as the data loader yields them; fewer where there are no more."""
    return list(itertools.islice(_loader(config), number))


def _loader(config: Config) -> DataLoader:
    with silent():
        return Runner.build_dataloader(without_workers(config.train_dataloader), seed=0)


def warm_up(model: nn.Module, config: Config, steps: int) -> None:
    """Train the student for some steps by its own losses alone, as a training without distillers begins.

    The learning rate rises linearly to that of the config. What distillers train stays as it is; what they remember, and an
    average of the student, move on.

    Args:
        model: The distilled student, in training mode.
        config: Its optimizer and data.
        steps: How many; from the second pass over the data on, they are in the order of the first.

    Raises:
        ConfigError: for a config without an optimizer.
    """
    if not config.get('optim_wrapper'):
        raise ConfigError(
            'optim_wrapper: the config has none, and a warm-up takes steps; name one, or leave --warm-up out'
        )
    kept = {key: config.optim_wrapper[key] for key in OPTIMIZER if config.optim_wrapper.get(key) is not None}
    wrapper = build_optim_wrapper(model, ConfigDict(kept, type='OptimWrapper'))
    rates = [group['lr'] for group in wrapper.optimizer.param_groups]
    for step, each in enumerate(itertools.islice(_endless(_loader(config)), steps), 1):
        for group, rate in zip(wrapper.optimizer.param_groups, rates):
            group['lr'] = rate * step / steps
        losses = model(**model.data_preprocessor(each, True), mode='loss')
        own = {key: value for key, value in losses.items() if key.partition('.')[0] not in model.distillers}
        wrapper.update_params(model.parse_losses(own)[0])


def _endless(loader: DataLoader) -> Iterator[dict]:
    found = True
    while found:
        found = False
        for each in loader:
            found = True
            yield each


def measure(model: nn.Module, data: Sequence[Mapping]) -> tuple[list[Term], float]:
    """Each loss's value and gradient over some batches, of which no step is taken.

    Args:
        model: The distilled student, in training mode.
        data: As :func:`batches` gives them.

    Returns:
        The task and the terms of the distillers; and how many times the task's gradient that of all these terms together is.
    """
    values: dict[str, list[float]] = {}
    figures: dict[str, list[tuple[float, float, float]]] = {}
    together: list[float] = []
    for each in data:
        batch = model.data_preprocessor(each, True)
        losses = model(**batch, mode='loss')
        own = 0.0
        for key, value in losses.items():
            if 'loss' in key:
                levels = value if isinstance(value, (list, tuple)) else [value]
                total = sum(float(level.detach().mean()) for level in levels)
                if key.partition('.')[0] in model.distillers:
                    values.setdefault(key, []).append(total)
                else:
                    own += total
        values.setdefault(TASK, []).append(own)
        gradients = gradients_of(losses, model.distillers, of_backbone(model))
        found = figures_of(gradients)
        of_task = float(found[TASK].norm) if TASK in found else 0.0
        terms = [gradient for name, gradient in gradients.items() if name != TASK]
        of_terms = float(norm([torch.stack(each).sum(0) for each in zip(*terms)])) if terms else 0.0
        together.append(of_terms / of_task if of_task else float('inf'))
        for name, pull in found.items():
            times = float(pull.norm) / of_task if of_task else float('inf')
            figures.setdefault(name, []).append((float(pull.share), float(pull.cosine), times))
    names = sorted(values, key=lambda name: (name != TASK, name))
    terms_of = [
        Term(name, statistics.median(values[name]), *map(statistics.median, zip(*figures[name])))
        for name in names
        if name in figures
    ]
    return terms_of, statistics.median(together)


class Memory(NamedTuple):
    """What a training step takes of the memory that is there, in MiB."""

    step: float
    """The peak: on a GPU of what is allocated, with weights, gradients and momenta; on a CPU of the whole process."""
    there: float
    device: str


def memory(model: nn.Module, batch: dict) -> Memory:
    """What training steps of the model take, with SGD in float32; it is changed by two of them."""
    device = next(model.parameters()).device
    step = training_step(model, batch, amp=False)
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats()
    for _ in range(2):  # the second with momenta
        step()
    if device.type == 'cuda':
        taken = torch.cuda.max_memory_allocated() / 2**20
        return Memory(
            taken, torch.cuda.get_device_properties(device).total_memory / 2**20, torch.cuda.get_device_name()
        )
    taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == 'darwin' else 2**10)
    return Memory(taken, os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**20, 'this machine')
