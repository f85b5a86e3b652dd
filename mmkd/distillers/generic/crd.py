"""Contrastive representation distillation (CRD), of the cells of a grid over each image.

Tian, Krishnan, Isola, "Contrastive Representation Distillation", ICLR 2020, arXiv 1910.10699.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.dist import all_reduce
from torch import nn

from mmkd.distillers.memory import Memory
from mmkd.distillers.relations import RelationDistiller
from mmkd.distillers.schedule import Weight
from mmkd.errors import ConfigError
from mmkd.registry import DISTILLERS
from mmkd.taps import Taps
from mmkd.values import check_temperature, is_whole


def contrast_scores(
    student: torch.Tensor, teacher: torch.Tensor, memory: torch.Tensor, tau: float = 0.07
) -> tuple[torch.Tensor, torch.Tensor]:
    """How like each of the student's embeddings is to the teacher's of the same sample, and to those of others.

    Args:
        student: (n, D), projected.
        teacher: (n, D), of the same samples.
        memory: (M, D), the teacher's of others.
        tau: Temperature.

    Returns:
        Cosines divided by tau, (n,) and (n, M).
    """
    student, teacher, memory = (F.normalize(each, dim=1) for each in (student, teacher, memory))
    return (student * teacher).sum(1) / tau, student @ memory.mT / tau


def contrast_loss(
    positive: torch.Tensor, negative: torch.Tensor, there: torch.Tensor, log_partition: torch.Tensor
) -> torch.Tensor:
    r"""Noise contrastive estimation: a sample's own pair is told from those with k others.

    .. math::
        L = -\frac{1}{n} \sum_i \Big( \log h(x_i) + \sum_{m=1}^{k} \log (1 - h(x_{im})) \Big), \qquad
        h(x) = \frac{e^x / Z}{e^x / Z + k}

    in the space of logarithms. k is the number of entries that are there, at least 1.

    Args:
        positive: x of the own pair, (n,), see :func:`contrast_scores`.
        negative: x of the others, (n, M).
        there: (M,) bool, False for an empty entry, which does not count.
        log_partition: Logarithm of Z, a scalar: of what the exponential of a score is on average.

    Returns:
        A scalar; 0 for no sample at all.
    """
    noise = there.sum().clamp(min=1).log() + log_partition
    own = torch.logaddexp(positive, noise) - positive
    others = (torch.logaddexp(negative, noise) - noise) * there
    return (own.sum() + others.sum()) / max(len(positive), 1)


@DISTILLERS.register_module()
class CRD(RelationDistiller):
    """The student's cells are told from all others by the teacher's; ``docs/methods/crd.md``.

    ``loss = loss_weight * sum over levels of contrast_loss``, see :func:`contrast_loss`. Samples are the cells of a grid over
    each image, without its padding: the g x g with the largest g of which all cells of a process's batch are at most
    ``samples``. Those they are told from are the teacher's cells of earlier steps, of all processes: a queue of them
    (:class:`mmkd.distillers.memory.Memory`) is in each checkpoint and equal on all processes. A linear map of each network to
    ``channels`` is trained with the student and not needed afterwards. Z is taken from the first step in which the queue has
    entries, the mean over all processes, and then stays. No ground truth. The loss is not 0 for equal networks.

    Args:
        layer: The student's layer, or a list; a queue for each level.
        channels: Of the projected embeddings. Default 128.
        tau: Temperature, positive. Default 0.07.
        memory: Entries of the queue, at least ``samples``. Default 4096.
        samples: Cells of a process's batch, and what each process adds to the queue in a step. Default 64.
        loss_weight: A number or a schedule. Default 0.8.
        teacher_layer: The teacher's layer, where its name differs.
        match: ``'stride'`` or ``'index'``: which levels belong together, see
            :class:`mmkd.distillers.levels.LevelPairs`.

    Example:
        >>> distillers = dict(crd=dict(type='CRD', layer='backbone.layer4'))
    """

    def __init__(
        self,
        layer: str | Sequence[str],
        channels: int = 128,
        tau: float = 0.07,
        memory: int = 4096,
        samples: int = 64,
        loss_weight: float | Mapping = 0.8,
        teacher_layer: str | Sequence[str] | None = None,
        match: str = 'stride',
    ):
        super().__init__(layer, 'cells', samples, teacher_layer, match)
        for name, value in (('channels', channels), ('memory', memory)):
            if not (is_whole(value) and value >= 1):
                raise ConfigError(f'{name}={value!r}: expected a whole number of at least 1')
        check_temperature(tau)
        if memory < samples:
            raise ConfigError(
                f'memory={memory}: expected at least samples={samples}, which are as many as a process adds in a step'
            )
        self.channels, self.tau, self.memory = channels, tau, memory
        self.loss_weight = Weight(loss_weight, 'loss_weight')

    def setup(self, student: Taps, teacher: Taps) -> None:
        super().setup(student, teacher)
        own, others = self.levels.unadapted(student, teacher)
        self.projections = nn.ModuleList(nn.Linear(level.shape[1], self.channels) for level in own)
        self.teacher_projections = nn.ModuleList(nn.Linear(level.shape[1], self.channels) for level in others)
        self.memories = nn.ModuleList(Memory(self.memory, level.shape[1], self.samples) for level in others)
        self.register_buffer('log_partitions', torch.zeros(len(own)))
        self.register_buffer('known', torch.zeros(len(own), dtype=torch.bool))  # which of them are
        # whether all are known and whether there are entries, for which nobody waits for the device; equal on all processes
        self._all_known = self._added = False

    def _load_from_state_dict(self, state: dict, prefix: str, *options: Any) -> None:
        super()._load_from_state_dict(state, prefix, *options)
        self._all_known = self._added = bool(self.known.all())

    def forward(self, student: Taps, teacher: Taps, data_samples: list | None) -> dict[str, torch.Tensor]:
        scores, seen = [], []
        levels = self.rows(student, teacher, data_samples)
        for level, ((s, t), memory) in enumerate(zip(levels, self.memories, strict=True)):
            project = self.teacher_projections[level]
            # copies: the queue changes before the backward pass
            keys, there = memory.keys.clone(), memory.filled.clone()
            scores.append((*self.scores(self.projections[level](s), project(t), project(keys)), there))
            seen.append(t)
        if not self._all_known:
            self._find_partitions(scores)
        loss = sum(contrast_loss(*each, log) for each, log in zip(scores, self.log_partitions, strict=True))
        for memory, rows in zip(self.memories, seen, strict=True):
            memory.add(rows)
        self._added = True
        return {'loss': self.loss_weight() * loss}

    def scores(
        self, student: torch.Tensor, teacher: torch.Tensor, memory: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of a level's projected embeddings; what :func:`contrast_loss` takes."""
        return contrast_scores(student, teacher, memory, self.tau)

    @torch.no_grad()
    def _find_partitions(self, scores: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> None:
        """Z of each level, kept from the first step in which there is anything to tell from."""
        means = []
        for positive, negative, there in scores:
            # in float64, whose range is that of any temperature
            total = positive.double().exp().sum() + (negative.double().exp() * there).sum()
            means.append(total / (len(positive) * (1 + there.sum())))
        mean = torch.stack(means)
        all_reduce(mean, 'mean')
        self.log_partitions.copy_(torch.where(self.known, self.log_partitions, mean.log().float()))
        self.known.copy_(torch.stack([there.any() for *_, there in scores]))
        self._all_known = self._added
