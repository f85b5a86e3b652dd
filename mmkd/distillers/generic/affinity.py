"""Affinity distillation: which positions a channel relates, the second term of knowledge adaptation (KTAAD).

He, Shen, Tian, Gong, Sun, Yan, "Knowledge Adaptation for Efficient Semantic Segmentation", CVPR 2019.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F

from mmkd.distillers.base import FeatureDistiller
from mmkd.registry import DISTILLERS


def affinity_loss(student: torch.Tensor, teacher: torch.Tensor, eps: float = 1e-12) -> torch.Tensor:
    r"""The distance of the matrices of a channel's products between all positions, summed over channels.

    .. math::
        L = \frac{1}{B} \sum_{b, c} \frac{1}{H W} \lVert u_{bc} u_{bc}^\top - v_{bc} v_{bc}^\top \rVert_F, \qquad
        u_{bc} = s_{bc} / \max(\lVert s_{bc} \rVert_2, \epsilon), \quad v_{bc} = t_{bc} / \max(\lVert t_{bc} \rVert_2, \epsilon)

    with a channel's map as a vector of H W positions. The matrices are not made: for vectors of length 1 their distance is
    :math:`\lVert u - v \rVert \lVert u + v \rVert / \sqrt 2`. Where one of the two is 0 throughout, a dead channel, this is
    :math:`1 / \sqrt 2` and the distance 1. Zero for equal features, and for those that differ in each channel by a factor, of
    either sign.

    Args:
        student: (B, C, H, W), adapted.
        teacher: The same shape; no gradient flows into it.
        eps: epsilon.

    Returns:
        A scalar.
    """
    u, v = (F.normalize(each.flatten(2), dim=2, eps=eps) for each in (student, teacher.detach()))
    # the norm's gradient at 0 is 0
    apart, along = (torch.linalg.vector_norm(each, dim=2) for each in (u - v, u + v))
    return (apart * along).sum(1).mean() / (2**0.5 * u.shape[2])


@DISTILLERS.register_module()
class Affinity(FeatureDistiller):
    """Which positions a channel of the student relates is what the teacher's does; ``docs/methods/affinity.md``.

    ``loss = loss_weight * sum over levels of affinity_loss``, see :func:`affinity_loss`. It is the second term of KTAAD, whose
    first one needs an auto-encoder of the teacher's features and is not here. No ground truth.

    Args:
        layer: The student's layer, or a list.
        loss_weight: A number or a schedule. Default 1.
        teacher_layer: The teacher's layer, where its name differs.
        adapter: ``'auto'`` (1x1 convolution exactly where channels differ), None or a dict.
        match: ``'stride'`` or ``'index'``: which levels belong together, see
            :class:`mmkd.distillers.levels.LevelPairs`.

    Example:
        >>> distillers = dict(affinity=dict(type='Affinity', layer='decode_head.bottleneck'))
    """

    renamed = {}

    def __init__(
        self,
        layer: str | Sequence[str],
        loss_weight: float | Mapping = 1.0,
        teacher_layer: str | Sequence[str] | None = None,
        adapter: str | Mapping | None = 'auto',
        match: str = 'stride',
    ):
        super().__init__(layer, loss_weight, teacher_layer, adapter, match)

    def compare(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return affinity_loss(student, teacher)
