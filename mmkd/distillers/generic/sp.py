"""Similarity-preserving distillation (SP).

Tung, Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019, arXiv 1907.09682.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F

from mmkd.distillers.relations import RelationDistiller
from mmkd.distillers.schedule import Weight
from mmkd.registry import DISTILLERS
from mmkd.taps import Taps


def similarity_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    r"""Mean square of the difference between both networks' similarities of all pairs.

    .. math:: L = \frac{1}{n^2} \lVert G^S - G^T \rVert_F^2, \qquad
        G_{i} = \frac{(Z Z^\top)_i}{\lVert (Z Z^\top)_i \rVert_2}

    with the rows i of the n x n matrix Z Z^T at length 1; a row of zeros stays one. Zero for equal inputs; unchanged when
    either is multiplied by a number other than 0, or turned.

    Args:
        student: Z, (n, D), an embedding of each sample.
        teacher: (n, D'); no gradient flows into it.

    Returns:
        A scalar.
    """
    own, other = (F.normalize(rows @ rows.mT, dim=1) for rows in (student, teacher.detach()))
    return (own - other).square().mean()


@DISTILLERS.register_module()
class SP(RelationDistiller):
    """Which samples are alike stays as it is in the teacher; ``docs/methods/sp.md``.

    ``loss = loss_weight * sum over levels of similarity_loss``, see :func:`similarity_loss`. Samples are images, cells of a
    grid or pixels, see :class:`mmkd.distillers.relations.RelationDistiller`; the relations are those within a process's
    batch. Numbers of channels may differ, nothing is trained beside the student, no ground truth.

    Args:
        layer: The student's layer, or a list.
        between: ``'cells'`` (default), ``'images'`` or ``'pixels'``.
        samples: Cells or pixels of a process's batch. Default 64. Memory grows with its square.
        loss_weight: A number or a schedule. Default 3000.
        teacher_layer: The teacher's layer, where its name differs.
        match: ``'stride'`` or ``'index'``: which levels belong together, see
            :class:`mmkd.distillers.levels.LevelPairs`.

    Example:
        >>> distillers = dict(sp=dict(type='SP', layer='backbone.layer4'))
    """

    least = 2

    def __init__(
        self,
        layer: str | Sequence[str],
        between: str = 'cells',
        samples: int = 64,
        loss_weight: float | Mapping = 3000.0,
        teacher_layer: str | Sequence[str] | None = None,
        match: str = 'stride',
    ):
        super().__init__(layer, between, samples, teacher_layer, match)
        self.loss_weight = Weight(loss_weight, 'loss_weight')

    def forward(self, student: Taps, teacher: Taps, data_samples: list | None) -> dict[str, torch.Tensor]:
        levels = self.rows(student, teacher, data_samples)
        return {'loss': self.loss_weight() * sum(similarity_loss(s, t) for s, t in levels)}
