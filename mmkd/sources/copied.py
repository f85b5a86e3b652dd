"""A frozen copy of the student as a source: what averages and snapshots have in common."""

import copy

import torch
from mmengine.dist import all_reduce, get_world_size
from torch import nn

from mmkd.hosts.running import run
from mmkd.sources.source import Kept, Source
from mmkd.taps import Taps


class Copied(Source):
    """A copy of the student, whose weights a subclass sets. It runs in eval mode and without gradient, and is in the checkpoint.

    Args:
        student: The student.
        interval: See :class:`mmkd.sources.source.Source`, as ``begin`` and ``end``.
        begin: Default 0.
        end: Default None.
    """

    kept: Kept

    def __init__(self, student: nn.Module, interval: int = 1, begin: int = 0, end: int | None = None):
        super().__init__(interval, begin, end)
        self.model = copy.deepcopy(student)
        self.kept = Kept(self.model, trained=False)

    @torch.no_grad()
    def read(self, student: nn.Module, inputs: torch.Tensor, data_samples: list | None) -> tuple[Taps, dict]:
        with Taps(self.model, self.layers, self.calls, images=len(inputs)) as taps:
            run(self.model, self.layers, inputs, data_samples)
        return taps, {}


def mean_of_processes(values: list[torch.Tensor]) -> list[torch.Tensor]:
    """Of each tensor the mean over all processes, such as of batch norms' statistics."""
    if not values or get_world_size() == 1:
        return values
    packed = torch.cat([each.float().flatten() for each in values])
    all_reduce(packed, 'mean')
    parts = packed.split([each.numel() for each in values])
    return [part.view_as(each).to(each.dtype) for part, each in zip(parts, values, strict=True)]
