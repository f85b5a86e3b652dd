"""The first steps of a distillation, without training: each loss, how strongly it pulls, and what a step takes."""

import copy
import itertools
import os
import resource
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from torch import nn

from mmkd.analysis.gradients import FAR_OFF, TASK, of_backbone, pulls
from mmkd.analysis.scores import silent
from mmkd.hosts.datasets import without_workers
from mmkd.testing.steps import training_step


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
    with silent():
        ready = Runner.build_dataloader(without_workers(config.train_dataloader), seed=0)
    return list(itertools.islice(ready, number))


def measure(model: nn.Module, data: Sequence[Mapping]) -> list[Term]:
    """Each loss's value and gradient over some batches, none of which is trained on.

    Args:
        model: The distilled student, in training mode.
        data: As :func:`batches` gives them.
    """
    values: dict[str, list[float]] = {}
    figures: dict[str, list[tuple[float, float, float]]] = {}
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
        found = pulls(losses, model.distillers, of_backbone(model))
        of_task = float(found[TASK].norm) if TASK in found else 0.0
        for name, pull in found.items():
            times = float(pull.norm) / of_task if of_task else float('inf')
            figures.setdefault(name, []).append((float(pull.share), float(pull.cosine), times))
    names = sorted(values, key=lambda name: (name != TASK, name))
    return [
        Term(name, statistics.median(values[name]), *map(statistics.median, zip(*figures[name])))
        for name in names
        if name in figures
    ]


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
