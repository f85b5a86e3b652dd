"""A frozen copy of the student as a source: what averages and snapshots have in common."""

import copy

import torch
from mmengine.dist import all_reduce, get_world_size
from torch import nn

from mmkd.data.views import check_name, views_of
from mmkd.hosts.running import predict, run
from mmkd.normalize import Normalize
from mmkd.sources.source import Kept, Source
from mmkd.taps import Taps


class Copied(Source):
    """A copy of the student, whose weights a subclass sets. It runs in eval mode and without gradient, and is in the checkpoint.

    Args:
        student: The student.
        view: The name of another image of the sample that it sees, see :class:`mmkd.sources.teacher.Teacher`. Default None.
        interval: See :class:`mmkd.sources.source.Source`, as ``begin`` and ``end``.
        begin: Default 0.
        end: Default None.
    """

    kept: Kept

    def __init__(
        self, student: nn.Module, view: str | None = None, interval: int = 1, begin: int = 0, end: int | None = None
    ):
        super().__init__(interval, begin, end)
        self.view = None if view is None else check_name(view)
        self._normalize: Normalize | None = None
        self.model = copy.deepcopy(student)
        self.kept = Kept(self.model, trained=False)

    def follow(self, preprocessor: nn.Module) -> None:
        self._normalize = Normalize(preprocessor, preprocessor)

    def seen(self, inputs: torch.Tensor, data_samples: list | None) -> torch.Tensor:
        if self.view is None or self._normalize is None:
            return inputs
        return self._normalize(views_of(data_samples, self.view, self.name), inputs.shape[2:], inputs.device)

    @torch.no_grad()
    def predict(self, student: nn.Module, inputs: torch.Tensor, data_samples: list) -> list:
        return predict(self.model, self.seen(inputs, data_samples), data_samples, inputs.shape[2:])

    @torch.no_grad()
    def read(self, student: nn.Module, inputs: torch.Tensor, data_samples: list | None) -> tuple[Taps, dict]:
        with Taps(self.model, self.layers, self.calls, images=len(inputs)) as taps:
            run(self.model, self.layers, self.seen(inputs, data_samples), data_samples)
        return taps, {}


def mean_of_processes(values: list[torch.Tensor]) -> list[torch.Tensor]:
    """Of each tensor the mean over all processes, such as of batch norms' statistics."""
    if not values or get_world_size() == 1:
        return values
    packed = torch.cat([each.float().flatten() for each in values])
    all_reduce(packed, 'mean')
    parts = packed.split([each.numel() for each in values])
    return [part.view_as(each).to(each.dtype) for part, each in zip(parts, values, strict=True)]
