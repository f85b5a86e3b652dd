"""The student itself as a source: deeper layers teach shallower ones."""

import torch
from torch import nn

from mmkd.registry import SOURCES
from mmkd.sources.source import Source
from mmkd.taps import Taps


@SOURCES.register_module()
class Own(Source):
    """What the student itself puts out, without gradient: self-distillation.

    Deeper layers teach shallower ones, or the main head an auxiliary one. The student runs once, as ever. It is also what
    a :class:`mmkd.sources.peer.Peer` learns from in mutual learning.

    Args:
        student: The student; filled in.
        interval: See :class:`mmkd.sources.source.Source`, as ``begin`` and ``end``.
        begin: Default 0.
        end: Default None.

    Example:
        >>> teacher = dict(own=dict(type='Own'))
        >>> distillers = dict(at=dict(type='AT', layer='backbone.layer3', teacher_layer='backbone.layer4'))
    """

    has_gradient = True

    def __init__(self, student: nn.Module, interval: int = 1, begin: int = 0, end: int | None = None):
        super().__init__(interval, begin, end)
        self.model = student

    def read(self, student: nn.Module, inputs: torch.Tensor, data_samples: list | None) -> tuple[Taps | None, dict]:
        return None, {}
