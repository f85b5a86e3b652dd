"""Overhaul of feature distillation (OFD): features before the activation, and no more than the activation needs.

Heo, Kim, Yun, Park, Kwak, Choi, "A Comprehensive Overhaul of Feature Distillation", ICCV 2019, arXiv 1904.01866.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType

import torch
from mmengine.dist import all_reduce
from torch import nn

from mmkd.distillers.base import FeatureDistiller
from mmkd.distillers.levels import Layer, layer_names
from mmkd.hosts.activations import before_activation
from mmkd.registry import DISTILLERS
from mmkd.taps import Taps

ADAPTER: Mapping = MappingProxyType(dict(type='ConvAdapter', bias=False, norm=True))


def partial_loss(student: torch.Tensor, teacher: torch.Tensor, margin: torch.Tensor) -> torch.Tensor:
    r"""Squared differences, of one image, from the teacher's feature with a lower bound; none where both are at most there.

    .. math:: t'_{bci} = \max(t_{bci}, m_c), \qquad
        L = \frac{1}{B} \sum_{b, c, i} [s_{bci} > t'_{bci} \text{ or } t'_{bci} > 0] \, (s_{bci} - t'_{bci})^2

    Where the teacher is negative the student is only pushed down, and no further than to m. 0 for equal inputs.

    Args:
        student: (B, C, H, W), before its activation, adapted.
        teacher: The same shape, before its activation; no gradient flows into it.
        margin: m, (C,), at most 0.

    Returns:
        A scalar.
    """
    target = torch.maximum(teacher.detach(), margin[:, None, None])
    counts = (student > target) | (target > 0)
    return ((student - target).square() * counts).sum() / len(student)


class Margin(nn.Module):
    r"""The mean of a channel's negative values, of all training steps and processes so far.

    .. math:: m_c = \frac{\sum_{b, i} \min(t_{bci}, 0)}{\#\{b, i: t_{bci} < 0\}}

    0 for a channel that has never been negative, where it makes no difference.

    Args:
        channels: C.
    """

    total: torch.Tensor
    count: torch.Tensor

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer('total', torch.zeros(channels))
        self.register_buffer('count', torch.zeros(channels))

    @torch.no_grad()
    def forward(self, teacher: torch.Tensor) -> torch.Tensor:
        """(C,); while training those of this step, (B, C, H, W), count as well, and all processes have to call it."""
        if self.training:
            sums = torch.stack([teacher.clamp(max=0).sum((0, 2, 3)), (teacher < 0).sum((0, 2, 3)).to(teacher.dtype)])
            all_reduce(sums)
            self.total += sums[0]
            self.count += sums[1]
        return self.total / self.count.clamp(min=1)


@DISTILLERS.register_module()
class OFD(FeatureDistiller):
    r"""Features before the activation, where a negative one of the teacher is only a bound; ``docs/methods/ofd.md``.

    .. math:: L = \text{loss\_weight} \cdot \sum_{k=1}^n 2^{k - n} \, L_k

    of the n pairs of levels in the order of their names, see :func:`partial_loss`. A layer that ends with an activation is read
    before it, see :func:`mmkd.hosts.activations.before_activation`; others, such as an FPN, as they are. The bound is measured,
    see :class:`Margin`, and kept in the checkpoint. No ground truth.

    Args:
        layer: The student's layer, or a list, from shallow to deep, such as the stages of its backbone.
        loss_weight: A number or a schedule. Default 1e-5, for images of 512 pixels and more: the loss is a sum over positions.
            For images of 224 pixels the authors have 1e-4.
        teacher_layer: The teacher's layer, where its name differs.
        adapter: ``'auto'``, None or a dict. Default: a 1x1 convolution and a batch norm for each level.
        match: ``'stride'`` or ``'index'``: which levels belong together, see
            :class:`mmkd.distillers.levels.LevelPairs`.

    Example:
        >>> distillers = dict(ofd=dict(type='OFD', layer=[f'backbone.layer{i}' for i in (2, 3, 4)]))
    """

    renamed = {}

    def __init__(
        self,
        layer: str | Sequence[str],
        loss_weight: float | Mapping = 1e-5,
        teacher_layer: str | Sequence[str] | None = None,
        adapter: str | Mapping | None = ADAPTER,
        match: str = 'stride',
    ):
        other = None if teacher_layer is None else _before(layer_names('teacher_layer', teacher_layer))
        super().__init__(_before(layer_names('layer', layer)), loss_weight, other, adapter, match)

    def setup(self, student: Taps, teacher: Taps) -> None:
        super().setup(student, teacher)
        _, targets = self.levels.unadapted(student, teacher)
        self.margins = nn.ModuleList(Margin(each.shape[1]) for each in targets)

    def forward(self, student: Taps, teacher: Taps, data_samples: list | None) -> dict[str, torch.Tensor]:
        pairs = self.levels(student, teacher)
        loss = 0.0
        for k, (pair, margin) in enumerate(zip(pairs, self.margins, strict=True), 1):
            loss = loss + 2.0 ** (k - len(pairs)) * partial_loss(pair.student, pair.teacher, margin(pair.teacher))
        return {'loss': self.loss_weight() * loss}


def _before(names: Sequence[Layer]) -> list[Callable[[nn.Module], str]]:
    return [partial(before_activation, layer=each) for each in names]
