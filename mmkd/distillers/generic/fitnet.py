"""Hints (FitNet): the squared error of features, the field's baseline.

Romero, Ballas, Kahou, Chassang, Gatta, Bengio, "FitNets: Hints for Thin Deep Nets", ICLR 2015, arXiv 1412.6550.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F

from mmkd.distillers.base import FeatureDistiller
from mmkd.registry import DISTILLERS


def hint_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    r"""Mean square of the difference.

    .. math:: L = \frac{1}{B C H W} \sum_{b, c, i} (s_{bci} - t_{bci})^2

    Args:
        student: (B, C, H, W), adapted.
        teacher: The same shape; no gradient flows into it.

    Returns:
        A scalar.
    """
    return F.mse_loss(student, teacher.detach())


@DISTILLERS.register_module()
class FitNet(FeatureDistiller):
    """The student's features become the teacher's; ``docs/methods/fitnet.md``.

    ``loss = loss_weight * sum over levels of hint_loss``, see :func:`hint_loss`. No ground truth. The scale of the teacher's
    features is part of the loss: :class:`mmkd.distillers.PKD` takes it out.

    Args:
        layer: The student's layer, or a list.
        loss_weight: A number or a schedule. Default 10.
        teacher_layer: The teacher's layer, where its name differs.
        adapter: ``'auto'`` (1x1 convolution exactly where channels differ), None or a dict.
        match: ``'stride'`` or ``'index'``: which levels belong together, see
            :class:`mmkd.distillers.levels.LevelPairs`.

    Example:
        >>> distillers = dict(fitnet=dict(type='FitNet', layer='neck'))
    """

    renamed = {}

    def __init__(
        self,
        layer: str | Sequence[str],
        loss_weight: float | Mapping = 10.0,
        teacher_layer: str | Sequence[str] | None = None,
        adapter: str | Mapping | None = 'auto',
        match: str = 'stride',
    ):
        super().__init__(layer, loss_weight, teacher_layer, adapter, match)

    def compare(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return hint_loss(student, teacher)
