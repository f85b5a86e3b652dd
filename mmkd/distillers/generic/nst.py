"""Neuron selectivity transfer (NST), and the maximum mean discrepancy that it minimizes.

Huang, Wang, "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer", 2017, arXiv 1707.01219.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F

from mmkd.distillers.base import FeatureDistiller
from mmkd.registry import DISTILLERS

Kernel = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Of samples (..., n, d) and (..., m, d) the similarity of each with each, (..., n, m)."""


def squared_mmd(first: torch.Tensor, second: torch.Tensor, kernel: Kernel) -> torch.Tensor:
    r"""The squared maximum mean discrepancy between two sets of samples, its biased estimate.

    .. math::
        \operatorname{MMD}^2 = \frac{1}{n^2} \sum_{i, i'} k(x_i, x_{i'}) + \frac{1}{m^2} \sum_{j, j'} k(y_j, y_{j'})
        - \frac{2}{n m} \sum_{i, j} k(x_i, y_j)

    i = i' and j = j' are among the sums, so that it is never negative, and 0 for equal sets, whatever their order.

    Args:
        first: x, (..., n, d).
        second: y, (..., m, d).
        kernel: k.

    Returns:
        (...).
    """
    own, other, both = (kernel(*pair).mean((-2, -1)) for pair in ((first, first), (second, second), (first, second)))
    return own + other - 2 * both


def polynomial(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    r"""The polynomial kernel of degree 2 without a constant, :math:`k(x, y) = (x^T y)^2`."""
    return (first @ second.transpose(-2, -1)).square()


def selectivity_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    r"""The :func:`squared_mmd` between the channels of both networks, as a mean over images.

    A channel's map over positions, divided by its L2 norm, is a sample; the kernel is :func:`polynomial`. The order of channels
    does not matter, nor their scale, unless it is 0, nor need both have as many.

    Args:
        student: (B, C, H, W).
        teacher: (B, D, H, W); no gradient flows into it.

    Returns:
        A scalar.
    """
    samples = (F.normalize(each.flatten(2), dim=2) for each in (student, teacher.detach()))
    return squared_mmd(*samples, polynomial).mean()


@DISTILLERS.register_module()
class NST(FeatureDistiller):
    """Where channels are active, as a distribution over channels; ``docs/methods/nst.md``.

    ``loss = loss_weight * sum over levels of selectivity_loss``, see :func:`selectivity_loss`. Nothing is trained beside the
    student, and it needs no ground truth. A student's level of another size is resized to the teacher's (bilinear).

    Args:
        layer: The student's layer, or a list.
        loss_weight: A number or a schedule. Default 50.
        teacher_layer: The teacher's layer, where its name differs.
        match: ``'stride'`` or ``'index'``: which levels belong together, see
            :class:`mmkd.distillers.levels.LevelPairs`.

    Example:
        >>> distillers = dict(nst=dict(type='NST', layer='backbone.layer4'))
    """

    renamed = {}
    same_channels = False

    def __init__(
        self,
        layer: str | Sequence[str],
        loss_weight: float | Mapping = 50.0,
        teacher_layer: str | Sequence[str] | None = None,
        match: str = 'stride',
    ):
        super().__init__(layer, loss_weight, teacher_layer, match=match)

    def compare(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return selectivity_loss(student, teacher)
