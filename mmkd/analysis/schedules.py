"""The learning rate and the loss weights over a training, before it begins."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import PARAM_SCHEDULERS
from torch import nn

BLOCKS = '▁▂▃▄▅▆▇█'
POINTS = 1000


@dataclass(frozen=True)
class Curve:
    """A quantity over the iterations.

    Args:
        name: What it is, as the config calls it.
        values: At equal distances from the first iteration to the last.
    """

    name: str
    values: tuple[float, ...]

    @property
    def constant(self) -> bool:
        return min(self.values) == max(self.values)

    def draw(self, width: int = 50) -> str:
        """One line of blocks, from 0 to the largest value."""
        top = max(self.values) or 1.0
        parts = np.array_split(np.asarray(self.values), min(width, len(self.values)))
        return ''.join(BLOCKS[min(int(part.mean() / top * len(BLOCKS)), len(BLOCKS) - 1)] for part in parts)


def learning_rate(config: Config, epoch: int) -> Curve:
    """The learning rate that a config's schedulers give, by mmengine's own.

    Args:
        config: With ``optim_wrapper``, ``param_scheduler`` and ``train_cfg``.
        epoch: The iterations of an epoch.
    """
    rate = config.optim_wrapper.optimizer.lr
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=rate)
    found = config.get('param_scheduler') or []
    iterations = length(config, epoch)
    schedulers = []
    for spec in [found] if isinstance(found, dict) else found:
        spec = copy.deepcopy(dict(spec))
        spec.pop('_scope_', None)
        kind = spec.pop('type')
        kind = PARAM_SCHEDULERS.get(kind) if isinstance(kind, str) else kind
        if 'Momentum' in kind.__name__:
            continue
        if spec.get('by_epoch', True) and not spec.pop('convert_to_iter_based', False):
            schedulers.append((epoch, kind(optimizer, **spec)))
        elif spec.get('by_epoch', True):
            schedulers.append((1, kind.build_iter_from_epoch(optimizer, epoch_length=epoch, **spec)))
        else:
            schedulers.append((1, kind(optimizer, **spec)))
    optimizer.step()  # else mmengine warns that the schedulers come first
    wanted = set(_points(iterations))
    values = []
    for iteration in range(iterations):
        if iteration in wanted:
            values.append(optimizer.param_groups[0]['lr'])
        for every, scheduler in schedulers:
            if (iteration + 1) % every == 0:
                scheduler.step()
    return Curve('learning rate', tuple(values))


def weights(distillers: nn.Module, iterations: int) -> list[Curve]:
    """The loss weights of all distillers that change during the training."""
    found = [
        Curve(f'{name}.{option}'.replace('.loss_weight.', '.'), tuple(map(weight.at, _points(iterations))))
        for name in distillers
        for option, weight in distillers.schedules(name).items()
    ]
    return [each for each in found if not each.constant]


def length(config: Config, epoch: int) -> int:
    """The iterations of a training."""
    training = config.train_cfg
    return int(training.max_iters) if 'max_iters' in training else int(training.max_epochs) * epoch


def _points(iterations: int) -> Sequence[int]:
    return sorted({round(each) for each in np.linspace(0, iterations - 1, min(POINTS, iterations))})
