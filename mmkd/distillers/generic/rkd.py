"""Relational knowledge distillation (RKD).

Park, Kim, Lu, Cho, "Relational Knowledge Distillation", CVPR 2019, arXiv 1904.05068.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F

from mmkd.distillers.relations import RelationDistiller, squared_distances
from mmkd.distillers.schedule import Weight
from mmkd.registry import DISTILLERS
from mmkd.taps import Taps


def distances(rows: torch.Tensor) -> torch.Tensor:
    """Euclidean distances of all pairs, (n, D) to (n, n); 0, with the gradient 0, between rows that are equal up to rounding."""
    squares = squared_distances(rows)
    apart = squares != 0
    return torch.where(apart, torch.where(apart, squares, 1.0).sqrt(), 0.0)


def distance_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    r"""Smooth L1 between both networks' distances of all pairs, in units of their mean.

    .. math:: L = \frac{1}{n^2} \sum_{i, j} \ell_1\Big( \frac{\lVert s_i - s_j \rVert}{\mu^S}, \frac{\lVert t_i - t_j
        \rVert}{\mu^T} \Big)

    with the mean over all distances above 0, and the sum over all pairs, a sample with itself among them. Zero for equal
    inputs, and for less than two samples; unchanged when either is moved, turned or scaled.

    Args:
        student: (n, D), an embedding of each sample.
        teacher: (n, D'); no gradient flows into it.

    Returns:
        A scalar.
    """

    def relative(rows: torch.Tensor) -> torch.Tensor:
        found = distances(rows)
        number = (found > 0).sum()
        mean = found.sum() / number.clamp(min=1)
        return found / torch.where(number > 0, mean, 1.0)

    return F.smooth_l1_loss(relative(student), relative(teacher.detach()))


def angle_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    r"""Smooth L1 between both networks' cosines of the angles of all triplets.

    .. math:: L = \frac{1}{n^3} \sum_{i, j, k} \ell_1( a^S_{ijk}, a^T_{ijk} ), \qquad
        a_{ijk} = \Big\langle \frac{e_j - e_i}{\lVert e_j - e_i \rVert}, \frac{e_k - e_i}{\lVert e_k - e_i \rVert} \Big\rangle

    with the angle at i, and 0 where two of the three are equal. Zero for equal inputs; unchanged when either is moved, turned
    or scaled. Memory is n^3, whatever D.

    Args:
        student: e, (n, D), an embedding of each sample.
        teacher: (n, D'); no gradient flows into it.

    Returns:
        A scalar.
    """

    def angles(rows: torch.Tensor) -> torch.Tensor:
        squares = squared_distances(rows)
        apart = squares != 0
        inverse = torch.where(apart, torch.where(apart, squares, 1.0).rsqrt(), 0.0)
        # 2 <e_j - e_i, e_k - e_i> = d_ij^2 + d_ik^2 - d_jk^2
        product = (squares[:, :, None] + squares[:, None, :] - squares) / 2
        return product * inverse[:, :, None] * inverse[:, None, :]

    return F.smooth_l1_loss(angles(student), angles(teacher.detach()))


@DISTILLERS.register_module()
class RKD(RelationDistiller):
    """Distances of pairs of samples and angles of triplets stay as they are in the teacher; ``docs/methods/rkd.md``.

    ============= ==========================================================================
    loss_distance ``distance_weight`` times the sum over levels of :func:`distance_loss`
    loss_angle    ``angle_weight`` times the sum over levels of :func:`angle_loss`
    ============= ==========================================================================

    Samples are images, cells of a grid or pixels, see :class:`mmkd.distillers.relations.RelationDistiller`; the relations are
    those within a process's batch, of 3 at least: the distance of two is their mean.
    Numbers of channels may differ, nothing is trained beside the student, no ground truth.

    Args:
        layer: The student's layer, or a list.
        between: ``'cells'`` (default), ``'images'`` or ``'pixels'``.
        samples: Cells or pixels of a process's batch. Default 64. Memory of the angles grows with its cube.
        distance_weight: A number or a schedule, as all weights. Default 25.
        angle_weight: Default 50.
        teacher_layer: The teacher's layer, where its name differs.
        match: ``'stride'`` or ``'index'``: which levels belong together, see
            :class:`mmkd.distillers.levels.LevelPairs`.

    Example:
        >>> distillers = dict(rkd=dict(type='RKD', layer='backbone.layer4'))
    """

    least = 3

    def __init__(
        self,
        layer: str | Sequence[str],
        between: str = 'cells',
        samples: int = 64,
        distance_weight: float | Mapping = 25.0,
        angle_weight: float | Mapping = 50.0,
        teacher_layer: str | Sequence[str] | None = None,
        match: str = 'stride',
    ):
        super().__init__(layer, between, samples, teacher_layer, match)
        self.distance_weight = Weight(distance_weight, 'distance_weight')
        self.angle_weight = Weight(angle_weight, 'angle_weight')

    def forward(self, student: Taps, teacher: Taps, data_samples: list | None) -> dict[str, torch.Tensor]:
        levels = self.rows(student, teacher, data_samples)
        return {
            'loss_distance': self.distance_weight() * sum(distance_loss(s, t) for s, t in levels),
            'loss_angle': self.angle_weight() * sum(angle_loss(s, t) for s, t in levels),
        }
