"""The flow of the solution procedure (FSP).

Yim, Joo, Bae, Kim, "A Gift from Knowledge Distillation: Fast Optimization, Network Minimization and Transfer Learning", CVPR
2017.
"""

import itertools
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F

from mmkd.distillers.base import Distiller
from mmkd.distillers.levels import LevelPairs
from mmkd.distillers.relations import pool_cells
from mmkd.distillers.schedule import Weight
from mmkd.errors import ConfigError
from mmkd.registry import DISTILLERS
from mmkd.taps import Taps


def flow(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    r"""The products of all channels of two maps of one network, averaged over positions.

    .. math:: G_{b c d} = \frac{1}{A} \sum_a x_{bca} y_{bda}

    Where the two differ in size the larger is averaged to the smaller's.

    Args:
        first: x, (B, C, H, W).
        second: y, (B, D, h, w).

    Returns:
        (B, C, D).
    """
    size = [min(sides) for sides in zip(first.shape[2:], second.shape[2:])]
    x, y = (each if list(each.shape[2:]) == size else pool_cells(each, size) for each in (first, second))
    return x.flatten(2) @ y.flatten(2).mT / (size[0] * size[1])


def flow_loss(student: tuple[torch.Tensor, torch.Tensor], teacher: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    r"""Mean square of the difference between both networks' :func:`flow`.

    .. math:: L = \frac{1}{B C D} \sum_{b, c, d} (G^S_{bcd} - G^T_{bcd})^2

    Zero for equal inputs.

    Args:
        student: Two maps, (B, C, H, W) and (B, D, h, w).
        teacher: Two maps of the same channels; no gradient flows into them.

    Returns:
        A scalar.
    """
    return F.mse_loss(flow(*student), flow(*(each.detach() for each in teacher)))


@DISTILLERS.register_module()
class FSP(Distiller):
    """How channels of one level go with those of the next stays as it is in the teacher; ``docs/methods/fsp.md``.

    ``loss = loss_weight * sum over pairs of successive levels of flow_loss``, see :func:`flow_loss`. No ground truth. Memory
    grows with the product of both levels' channels.

    Args:
        layer: The student's layers, two or more, or one of several levels; levels succeed each other in this order.
        loss_weight: A number or a schedule. Default 50.
        teacher_layer: The teacher's layers, where their names differ.
        adapter: ``'auto'`` (1x1 convolution exactly where channels differ), None or a dict.
        match: ``'stride'`` or ``'index'``: which levels belong together, see
            :class:`mmkd.distillers.levels.LevelPairs`.

    Raises:
        ConfigError: for a single level.

    Example:
        >>> distillers = dict(fsp=dict(type='FSP', layer=['backbone.layer1', 'backbone.layer2']))
    """

    any_scale = True

    def __init__(
        self,
        layer: str | Sequence[str],
        loss_weight: float | Mapping = 50.0,
        teacher_layer: str | Sequence[str] | None = None,
        adapter: str | Mapping | None = 'auto',
        match: str = 'stride',
    ):
        super().__init__()
        self.levels = LevelPairs(layer, teacher_layer, adapter, match)
        self.student_layers, self.teacher_layers = self.levels.student_layers, self.levels.teacher_layers
        self.loss_weight = Weight(loss_weight, 'loss_weight')

    def setup(self, student: Taps, teacher: Taps) -> None:
        self.levels.setup(student, teacher)
        if len(self.levels.pairs) < 2:
            raise ConfigError(
                f'layer={", ".join(self.student_layers)!r}: a single level, and FSP compares what happens between two; name '
                f'two layers'
            )

    def forward(self, student: Taps, teacher: Taps, data_samples: list | None) -> dict[str, torch.Tensor]:
        pairs = self.levels(student, teacher)
        loss = sum(flow_loss((a.student, b.student), (a.teacher, b.teacher)) for a, b in itertools.pairwise(pairs))
        return {'loss': self.loss_weight() * loss}
