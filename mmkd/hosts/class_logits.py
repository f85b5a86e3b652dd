"""The class logits of two networks at the same positions, whatever head puts them out."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from mmkd.classes import ClassMap
from mmkd.taps import Taps


class ClassLogits(NamedTuple):
    """Class logits of the same positions."""

    student: torch.Tensor
    """(P, K, ...), with gradient: K classes that both know, and of a RoI head the background as the last."""
    teacher: torch.Tensor
    """The same shape, without gradient."""
    sigmoid: bool
    """Whether each class has a probability of its own; else all of a position share 1."""
    valid: torch.Tensor | None = None
    """(P, ...), False for a position that does not count; None: all do."""
    classes: ClassMap | None = None
    """Which of the student's classes they are; None: all, in its order."""
    weights: torch.Tensor | None = None
    """(P, ...), how much a position counts, not in what a loss is divided by; None: 1."""

    def positions_of(self, labels: torch.Tensor) -> torch.Tensor:
        """Which of the K classes each label is, -1 for none of them.

        Args:
            labels: (P, ...), as the student counts; -1 for none.
        """
        if self.classes is None:
            return labels
        found = torch.full_like(labels, -1)
        for position, own in enumerate(self.classes.student):
            found = torch.where(labels == own, position, found)
        return found


class LogitsReader(nn.Module):
    """Reads :class:`ClassLogits`: which layers it needs, what it refuses, and what they hold in a step."""

    student_layers: Sequence[str] = ()
    teacher_layers: Sequence[str] = ()
    sigmoid = False
    """Whether each class has a probability of its own; else all of a position share 1."""
    has_labels = False
    """Whether each position has a label, :meth:`labels`."""
    label_layers: Sequence[str] = ()
    """The layers of the student's loss that :meth:`labels` reads, where it reads any: they have to be tapped for it."""

    def prepare(self, student: nn.Module, teacher: nn.Module) -> None:
        """Name the layers, and refuse networks without such heads, before any of them is run."""

    def setup(self, student: Taps, teacher: Taps) -> None:
        """Refuse networks whose classes or positions are not the same."""
        raise NotImplementedError(f'{type(self).__name__} has no setup')

    def positions(self, student: Taps, teacher: Taps) -> list[tuple[int, ...]]:
        """For each layer the shape of its positions for one image, which are those of another teacher where it is equal."""
        return []

    def forward(self, student: Taps, teacher: Taps, data_samples: list | None) -> list[ClassLogits]:
        """Those of a step, an entry for each layer."""
        raise NotImplementedError(f'{type(self).__name__} has no forward')

    def labels(self, logits: ClassLogits, student: Taps, data_samples: list | None) -> torch.Tensor:
        """The class of each position, (P, ...) int64, as the student counts; -1 where there is none. With ``has_labels``."""
        raise NotImplementedError(f'{type(self).__name__} has no labels')
