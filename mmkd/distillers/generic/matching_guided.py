"""Matching-guided distillation: each channel of the student learns from the teacher's channels that are most like it.

Yue, Deng, Zhou, "Matching Guided Distillation", ECCV 2020, arXiv 2008.09958.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.dist import all_reduce, broadcast
from torch import nn

from mmkd.distillers.base import Distiller
from mmkd.distillers.generic.ofd import Margin, partial_loss
from mmkd.distillers.levels import LevelPairs, layer_names
from mmkd.distillers.schedule import Weight
from mmkd.errors import ConfigError
from mmkd.hosts.activations import before_activation
from mmkd.registry import DISTILLERS
from mmkd.taps import Taps
from mmkd.values import is_whole

REDUCTIONS = ('absmax', 'max', 'mean')


def likeness(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    r"""How alike the channels of two maps are, of all images.

    .. math:: A_{ij} = \sum_b \frac{s_{bi} \cdot t_{bj}}{\lVert s_{bi} \rVert \lVert t_{bj} \rVert}

    over the positions of an image. A channel that is 0 everywhere is like no other, 0.

    Args:
        student: (B, C, H, W).
        teacher: (B, D, H, W).

    Returns:
        (C, D).
    """
    s, t = (F.normalize(each.flatten(2), dim=2) for each in (student, teacher))
    return torch.einsum('bci,bdi->cd', s, t)


def assign(alike: torch.Tensor) -> torch.Tensor:
    r"""To each channel of the student G of the teacher's, none of them twice, so that they are as alike as they can be in all.

    G = floor(D / C), the optimal assignment of G copies of each of the student's channels. D - G C channels of the teacher are
    left out. It is computed by scipy, on the processor.

    Args:
        alike: (C, D), D at least C.

    Returns:
        (G, C) int64, channels of the teacher.
    """
    from scipy.optimize import linear_sum_assignment  # slow to import

    groups = alike.shape[1] // len(alike)
    _, found = linear_sum_assignment(alike.repeat(groups, 1).cpu().numpy(), maximize=True)
    return torch.from_numpy(found).reshape(groups, -1).to(alike.device)


def reduce_channels(teacher: torch.Tensor, assignment: torch.Tensor, how: str = 'absmax') -> torch.Tensor:
    """One map of those of the teacher's channels that are assigned to one of the student's.

    Args:
        teacher: (B, D, H, W).
        assignment: (G, C), see :func:`assign`.
        how: At each position ``'absmax'``, the value that is furthest from 0, ``'max'`` or ``'mean'``.

    Returns:
        (B, C, H, W).
    """
    groups = teacher[:, assignment.flatten()].unflatten(1, assignment.shape)
    if how == 'max':
        return groups.amax(1)
    if how == 'mean':
        return groups.mean(1)
    return groups.gather(1, groups.abs().argmax(1, keepdim=True))[:, 0]


class Matching(nn.Module):
    """Which channels of the teacher each of the student's learns from, made anew from time to time.

    Of each ``interval`` training steps the first ``track`` add up how alike channels are, on all processes; by that they are then
    assigned. Until the first time it is by the images of the first step.

    Args:
        student: C, the student's channels.
        teacher: D, the teacher's.
        interval: Training steps from one assignment to the next.
        track: How many of them are looked at.
    """

    alike: torch.Tensor
    assignment: torch.Tensor
    steps: torch.Tensor

    def __init__(self, student: int, teacher: int, interval: int, track: int):
        super().__init__()
        self.interval, self.track = interval, track
        self.register_buffer('alike', torch.zeros(student, teacher))
        groups = teacher // student
        self.register_buffer('assignment', torch.arange(groups * student).reshape(groups, student))
        self.register_buffer('steps', torch.zeros((), dtype=torch.long))
        self._steps = 0  # the same, for which nobody waits for the device

    def _load_from_state_dict(self, state: dict, prefix: str, *options: Any) -> None:
        super()._load_from_state_dict(state, prefix, *options)
        self._steps = int(self.steps)

    @torch.no_grad()
    def forward(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """(G, C), see :func:`assign`; while training this is a step more, and all processes have to call it."""
        if self.training:
            step = self._steps % self.interval
            if step < self.track:
                found = likeness(student, teacher).nan_to_num(0.0)  # of an overflow, which the optimizer skips as well
                all_reduce(found)
                self.alike += found
            if self._steps == 0 or step == self.track - 1:
                self.assignment.copy_(assign(self.alike))
                broadcast(self.assignment)
            if step == self.track - 1:
                self.alike.zero_()
            self._steps += 1
            self.steps += 1
        return self.assignment


@DISTILLERS.register_module()
class MatchingGuided(Distiller):
    r"""Channels of the teacher, matched with the student's and reduced to as many; ``docs/methods/matchingguided.md``.

    .. math:: L = \text{loss\_weight} \cdot \sum_{k=1}^n 2^{k - n} \, L_k

    of the n pairs of levels in the order of their names. L_k is :func:`mmkd.distillers.generic.ofd.partial_loss` between the
    student's feature behind a batch norm and the teacher's, see :class:`Matching` and :func:`reduce_channels`; its margin is the
    mean of those of the channels that are assigned. A layer that ends with an activation is read before it. There is no other
    adapter. The assignment is in the checkpoint and equal on all processes. No ground truth.

    Args:
        layer: The student's layer, or a list, from shallow to deep, such as the stages of its backbone.
        reduction: ``'absmax'`` (default), ``'max'`` or ``'mean'``.
        interval: Training steps between assignments. Default 5000.
        track: How many steps of each interval are looked at. Default 1000.
        loss_weight: A number or a schedule. Default 2.5e-8, the authors' for a detector's images: the loss is a sum over
            positions.
        teacher_layer: The teacher's layer, where its name differs.
        match: ``'stride'`` or ``'index'``: which levels belong together, see
            :class:`mmkd.distillers.levels.LevelPairs`.

    Raises:
        ConfigError: for a teacher with fewer channels than the student.

    Example:
        >>> distillers = dict(matching=dict(type='MatchingGuided', layer=[f'backbone.layer{i}' for i in (2, 3, 4)]))
    """

    any_scale = True

    def __init__(
        self,
        layer: str | Sequence[str],
        reduction: str = 'absmax',
        interval: int = 5000,
        track: int = 1000,
        loss_weight: float | Mapping = 2.5e-8,
        teacher_layer: str | Sequence[str] | None = None,
        match: str = 'stride',
    ):
        super().__init__()
        if reduction not in REDUCTIONS:
            raise ConfigError(f'reduction={reduction!r}: expected one of {", ".join(map(repr, REDUCTIONS))}')
        for name, value in (('interval', interval), ('track', track)):
            if not (is_whole(value) and value >= 1):
                raise ConfigError(f'{name}={value!r}: expected a whole number of steps, at least 1')
        if track > interval:
            raise ConfigError(f'track={track!r}: expected at most interval={interval!r}')
        names, others = (
            [partial(before_activation, layer=each) for each in layer_names(option, given)]
            for option, given in (
                ('layer', layer),
                ('teacher_layer', layer if teacher_layer is None else teacher_layer),
            )
        )
        self.levels = LevelPairs(names, others, match=match, same_channels=False)
        self.reduction, self.interval, self.track = reduction, interval, track
        self.loss_weight = Weight(loss_weight, 'loss_weight')

    def prepare(self, student: nn.Module, teacher: nn.Module) -> None:
        self.levels.prepare(student, teacher)
        self.student_layers, self.teacher_layers = self.levels.student_layers, self.levels.teacher_layers

    def setup(self, student: Taps, teacher: Taps) -> None:
        self.levels.setup(student, teacher)
        widths = [(s.shape[1], t.shape[1]) for s, t in zip(*self.levels.unadapted(student, teacher), strict=True)]
        for own, other in widths:
            if other < own:
                raise ConfigError(
                    f'layer={", ".join(self.student_layers)!r}: {own} channels, and the teacher has {other}, of which each needs '
                    f'one at least; take a wider teacher, or OFD, which has adapters'
                )
        self.norms = nn.ModuleList(nn.BatchNorm2d(own, track_running_stats=False) for own, _ in widths)
        self.matchings = nn.ModuleList(Matching(own, other, self.interval, self.track) for own, other in widths)
        self.margins = nn.ModuleList(Margin(other) for _, other in widths)

    def forward(self, student: Taps, teacher: Taps, data_samples: list | None) -> dict[str, torch.Tensor]:
        pairs = self.levels(student, teacher)
        loss = 0.0
        for k, (pair, norm, matching, margin) in enumerate(
            zip(pairs, self.norms, self.matchings, self.margins, strict=True), 1
        ):
            assignment = matching(pair.student, pair.teacher)
            target = reduce_channels(pair.teacher, assignment, self.reduction)
            bound = margin(pair.teacher)[assignment].mean(0)
            loss = loss + 2.0 ** (k - len(pairs)) * partial_loss(norm(pair.student), target, bound)
        return {'loss': self.loss_weight() * loss}
