"""Knowledge review (ReviewKD).

Chen, Liu, Zhao, Jia, "Distilling Knowledge via Knowledge Review", CVPR 2021, arXiv 2104.09044.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from mmkd.adapters import ConvAdapter
from mmkd.distillers.base import Distiller
from mmkd.distillers.levels import LevelPair, LevelPairs
from mmkd.distillers.relations import pool_cells
from mmkd.distillers.schedule import Weight
from mmkd.errors import ConfigError
from mmkd.registry import DISTILLERS
from mmkd.taps import Taps
from mmkd.values import is_whole

GRIDS = (4, 2, 1)
"""Cells along each side of the context maps of HCL."""


def context_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    r"""Hierarchical context loss (HCL): mean squares of the maps, and of their means over coarser and coarser grids.

    .. math:: L = \frac{\sum_l w_l \operatorname{MSE}(\operatorname{pool}_l s, \operatorname{pool}_l t)}{\sum_l w_l}

    with l = 0 the maps themselves, w = 1, then the grids of 4x4, 2x2 and 1x1 cells that are smaller than the map along its
    shorter side, each with half the weight of the one before. Zero for equal inputs.

    Args:
        student: (B, C, H, W).
        teacher: The same shape; no gradient flows into it.

    Returns:
        A scalar.
    """
    difference = student - teacher.detach()  # pooling is linear
    loss, weight, total = difference.square().mean(), 1.0, 1.0
    for cells in GRIDS:
        if cells < min(student.shape[2:]):
            weight /= 2
            total += weight
            loss = loss + weight * pool_cells(difference, (cells, cells)).square().mean()
    return loss / total


class Fusion(nn.Module):
    """Attention based fusion (ABF) of a level with what comes from the next deeper one.

    ``x = BN(conv1x1(level))``; where there is a deeper level, with y its fused map (nearest, at this level's size),
    ``a, b = sigmoid(conv1x1([x, y]))`` and ``x = a x + b y``. Puts out ``BN(conv3x3(x))`` and x.

    Args:
        in_channels: The student's.
        out_channels: The teacher's.
        channels: Of x and y.
        deepest: Whether there is no deeper level.
    """

    def __init__(self, in_channels: int, out_channels: int, channels: int, deepest: bool):
        super().__init__()
        self.reduce = ConvAdapter(in_channels, channels, bias=False, norm=True)
        self.attend = None if deepest else self.attention(channels)
        self.put_out = ConvAdapter(channels, out_channels, kernel_size=3, bias=False, norm=True)
        for conv in (self.reduce.conv, self.put_out.conv):
            nn.init.kaiming_uniform_(conv.weight, a=1)

    def attention(self, channels: int) -> nn.Module:
        """What finds a and b."""
        return nn.Conv2d(2 * channels, 2, 1)

    def shares(self, x: torch.Tensor, y: torch.Tensor) -> Sequence[torch.Tensor]:
        """a and b."""
        return self.attend(torch.cat([x, y], 1)).sigmoid().split(1, 1)

    def forward(self, level: torch.Tensor, deeper: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.reduce(level)
        if self.attend is not None and deeper is not None:
            y = F.interpolate(deeper, x.shape[2:], mode='nearest')
            a, b = self.shares(x, y)
            x = a * x + b * y
        return self.put_out(x), x


class Fusions(nn.ModuleList):
    """A fusion for each level, the finest first, with which it and all deeper ones become the teacher's level.

    Args:
        kind: :class:`Fusion` or a subclass.
        student: The levels, (B, C, H, W) each, the finest first.
        teacher: Those of the teacher.
        channels: Of the fused maps.
        layers: What the levels are of, for an error.

    Raises:
        ConfigError: for a single level.
    """

    def __init__(
        self,
        kind: type[Fusion],
        student: Sequence[torch.Tensor],
        teacher: Sequence[torch.Tensor],
        channels: int,
        layers: Sequence[str],
    ):
        if len(student) < 2:
            raise ConfigError(
                f'layer={", ".join(layers)!r}: a single level, and each is fused with the deeper ones; name two layers'
            )
        super().__init__(
            kind(s.shape[1], t.shape[1], channels, deepest=index == len(student) - 1)
            for index, (s, t) in enumerate(zip(student, teacher, strict=True))
        )

    def forward(self, pairs: Sequence[LevelPair]) -> torch.Tensor:
        """The sum over levels of :func:`context_loss` between the fused level and the teacher's."""
        loss, deeper = 0.0, None
        for pair, fusion in zip(reversed(pairs), reversed(self), strict=True):
            fused, deeper = fusion(pair.student, deeper)
            loss = loss + context_loss(fused, pair.teacher)
        return loss


@DISTILLERS.register_module()
class ReviewKD(Distiller):
    """Each level of the student and all deeper ones together become the teacher's level; ``docs/methods/reviewkd.md``.

    ``loss = loss_weight * sum over levels of context_loss(fused student level, teacher level)``, see :class:`Fusion` and
    :func:`context_loss`. From the last level to the first; there is one fusion per level, which is trained with the student
    and not needed afterwards. No ground truth. The loss is not 0 for equal networks. A level that is one position of one image
    has no batch norm: images have to be larger, or batches.

    Args:
        layer: The student's layer of several levels, or a list of layers, the finest first.
        channels: Of the fused maps. Default 256.
        loss_weight: A number or a schedule. Default 1.
        teacher_layer: The teacher's layer, where its name differs.
        match: ``'stride'`` or ``'index'``: which levels belong together, see
            :class:`mmkd.distillers.levels.LevelPairs`.

    Raises:
        ConfigError: for a single level.

    Example:
        >>> distillers = dict(reviewkd=dict(type='ReviewKD', layer='neck'))
    """

    any_scale = True

    def __init__(
        self,
        layer: str | Sequence[str],
        channels: int = 256,
        loss_weight: float | Mapping = 1.0,
        teacher_layer: str | Sequence[str] | None = None,
        match: str = 'stride',
    ):
        super().__init__()
        if not (is_whole(channels) and channels >= 1):
            raise ConfigError(f'channels={channels!r}: expected a whole number of at least 1')
        self.channels = channels
        self.levels = LevelPairs(layer, teacher_layer, match=match, same_channels=False)
        self.student_layers, self.teacher_layers = self.levels.student_layers, self.levels.teacher_layers
        self.loss_weight = Weight(loss_weight, 'loss_weight')

    def setup(self, student: Taps, teacher: Taps) -> None:
        self.levels.setup(student, teacher)
        features, targets = self.levels.unadapted(student, teacher)
        self.fusions = Fusions(Fusion, features, targets, self.channels, self.student_layers)

    def forward(self, student: Taps, teacher: Taps, data_samples: list | None) -> dict[str, torch.Tensor]:
        return {'loss': self.loss_weight() * self.fusions(self.levels(student, teacher))}
