"""The student of some steps ago as a source: each cycle's last weights teach the next one."""

import torch
from torch import nn

from mmkd.errors import ConfigError
from mmkd.registry import SOURCES
from mmkd.sources.copied import Copied, mean_of_processes
from mmkd.values import is_whole


@SOURCES.register_module()
class Snapshot(Copied):
    """The student as it was at the end of the last cycle, frozen: snapshot distillation.

    After each ``cycle`` training steps its weights are copied, whether it is read then or not; before the first cycle has
    ended it is not read. Buffers, such as the statistics of batch norms, are averaged over all processes. It runs in eval
    mode and without gradient, is in the checkpoint as ``sources.<name>.*``, and ``mmkd export`` leaves it out unless told to
    write it.

    Yang, Xie, Su, Yuille, "Snapshot Distillation: Teacher-Student Optimization in One Generation", CVPR 2019, arXiv
    1812.00123, where each cycle is one of a learning rate that is restarted.

    Args:
        student: The student; filled in.
        cycle: The number of training steps between two copies.
        interval: See :class:`mmkd.sources.source.Source`, as ``begin`` and ``end``.
        begin: Default, and least, the end of the first cycle, from which ``interval`` counts.
        end: Default None.

    Raises:
        ConfigError: for a cycle that is none.

    Example:
        >>> teacher = dict(before=dict(type='Snapshot', cycle=20000))
        >>> distillers = dict(kd=dict(type='KD', tau=2.0))
    """

    def __init__(self, student: nn.Module, cycle: int, interval: int = 1, begin: int = 0, end: int | None = None):
        if not (is_whole(cycle) and cycle >= 1):
            raise ConfigError(f'cycle={cycle!r}: expected a whole number of training steps, at least 1')
        # before, there is nothing to learn from
        super().__init__(student, interval=interval, begin=max(begin, cycle) if is_whole(begin) else begin, end=end)
        self.cycle = cycle

    @torch.no_grad()
    def start_step(self, student: nn.Module, iteration: int) -> None:
        if iteration == 0 or iteration % self.cycle:
            return
        own, copied = (dict(model.named_parameters()) | dict(model.named_buffers()) for model in (student, self.model))
        buffers = [name for name, value in self.model.named_buffers() if value.is_floating_point()]
        own |= dict(zip(buffers, mean_of_processes([own[name] for name in buffers]), strict=True))
        for name, value in copied.items():
            value.copy_(own[name])
