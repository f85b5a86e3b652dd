"""The student's average over its steps as a source: a mean teacher."""

import torch
from torch import nn

from mmkd.errors import ConfigError
from mmkd.registry import SOURCES
from mmkd.sources.copied import Copied, mean_of_processes
from mmkd.values import is_number


@SOURCES.register_module()
class Average(Copied):
    r"""The student's weights, averaged over its steps: a mean teacher.

    .. math:: \theta'_n = \alpha_n \theta'_{n-1} + (1 - \alpha_n) \theta_n, \qquad \alpha_n = \min(\alpha, n / (n + 1))

    with n = 0 in the first step in which it is due, so that it begins as the student and is a plain mean at first. It is
    averaged in the steps in which it is due, whether it is read then or not, and only if the student's weights have
    changed since, so that gradient accumulation changes nothing.
    Buffers, such as the statistics of batch norms, are averaged as well, over all processes. It runs in eval mode and
    without gradient, is in the checkpoint as ``sources.<name>.*``, and ``mmkd export`` leaves it out unless told to
    write it.

    Tarvainen, Valpola, "Mean teachers are better role models", NeurIPS 2017, arXiv 1703.01780.

    Args:
        student: The student; filled in.
        momentum: alpha, at least 0 and below 1. Default 0.999.
        view: The name of another image of the sample that it sees, see :class:`mmkd.sources.teacher.Teacher`. Default None.
        interval: See :class:`mmkd.sources.source.Source`, as ``begin`` and ``end``.
        begin: Default 0.
        end: Default None.

    Raises:
        ConfigError: for a momentum that is none.
    """

    def __init__(
        self,
        student: nn.Module,
        momentum: float = 0.999,
        view: str | None = None,
        interval: int = 1,
        begin: int = 0,
        end: int | None = None,
    ):
        super().__init__(student, view, interval, begin, end)
        if not (is_number(momentum) and 0 <= momentum < 1):
            raise ConfigError(f'momentum={momentum!r}: expected a number of at least 0 and below 1')
        self.momentum = momentum
        self.kept.register_buffer('steps', torch.zeros(()))
        self._seen: int | None = None

    @torch.no_grad()
    def start_step(self, student: nn.Module, iteration: int) -> None:
        # not where it is read: processes whose images have no use for it must average with the others
        if not self.due(iteration):
            return
        own = dict(student.named_parameters()) | dict(student.named_buffers())
        names = [name for name, _ in self.model.named_parameters()]
        # each optimizer changes weights in place, which their versions count
        versions = sum(own[name]._version for name in names)
        if versions == self._seen:
            return
        self._seen = versions
        buffers = dict(self.model.named_buffers())
        floating = [name for name, value in buffers.items() if value.is_floating_point()]
        values = mean_of_processes([own[name] for name in floating])
        averages = [*self.model.parameters(), *(buffers[name] for name in floating)]
        steps = self.kept.get_buffer('steps')
        momentum = (steps / (steps + 1)).clamp(max=self.momentum)
        torch._foreach_mul_(averages, momentum)
        torch._foreach_add_(averages, torch._foreach_mul([*(own[name] for name in names), *values], 1 - momentum))
        for name in buffers.keys() - set(floating):
            buffers[name].copy_(own[name])
        steps += 1
