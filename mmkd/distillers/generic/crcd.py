"""Complementary relation contrastive distillation (CRCD), its relations of features, between the cells of a grid.

Zhu, Tang, Chen, Yu, Liu, Rong, Yang, Wang, "Complementary Relation Contrastive Distillation", CVPR 2021, arXiv 2103.16367.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F

from mmkd.distillers.generic.crd import CRD
from mmkd.errors import ConfigError
from mmkd.registry import DISTILLERS


def relations(embeddings: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
    """The direction in which each anchor sees each embedding: their difference, of length 1.

    A difference shorter than 1e-3 is divided by that: its direction is rounding, and equal ones have the relation 0.

    Args:
        embeddings: (m, D), the same for all anchors, or (A, m, D).
        anchors: (A, D).

    Returns:
        (A, m, D).
    """
    return F.normalize(embeddings - anchors[:, None], dim=2, eps=1e-3)


def relation_scores(
    student: torch.Tensor, teacher: torch.Tensor, memory: torch.Tensor, tau: float = 0.05
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""How like the student's relations to the teacher's samples are to the teacher's own, and to those of others.

    .. math:: x_{ai} = \frac{1}{\tau} \langle r(s_i, t_a), r(t_i, t_a) \rangle, \qquad
        x_{aim} = \frac{1}{\tau} \langle r(s_i, t_a), r(t_m, t_a) \rangle, \qquad
        r(e, a) = \frac{e - a}{\lVert e - a \rVert}

    of embeddings of length 1, for all pairs of an anchor a and another sample i of the batch; m are the entries of the memory.
    Memory is n * M * (n + D).

    Args:
        student: s, (n, D), projected; made to length 1 here, as the others.
        teacher: t, (n, D), of the same samples, and the anchors.
        memory: (M, D), the teacher's of others.
        tau: Temperature.

    Returns:
        (n * (n - 1),) and (n * (n - 1), M).
    """
    student, teacher, memory = (F.normalize(each, dim=1) for each in (student, teacher, memory))
    sample = torch.arange(len(teacher), device=teacher.device)
    others = (sample[:, None] + sample[1:]) % len(teacher)  # of each anchor
    own = relations(student[others], teacher) / tau
    positive = (own * relations(teacher[others], teacher)).sum(2)
    negative = own @ relations(memory, teacher).mT
    return positive.flatten(), negative.flatten(0, 1)


@DISTILLERS.register_module()
class CRCD(CRD):
    """The student's cells are, seen from the teacher's, where the teacher's own are; ``docs/methods/crcd.md``.

    As :class:`mmkd.distillers.CRD`, with relations in place of cells: ``loss = loss_weight * sum over levels of``
    :func:`mmkd.distillers.generic.crd.contrast_loss` of :func:`relation_scores`. Each cell of a process's batch is the anchor
    of all others. The method's second kind of relations, between gradients, is not here. No ground truth. The loss is not 0
    for equal networks.

    Args:
        layer: The student's layer, or a list; a queue for each level.
        channels: Of the projected embeddings. Default 128.
        tau: Temperature, positive. Default 0.05.
        memory: Entries of the queue, at least ``samples``. Default 500.
        samples: Cells of a process's batch, at least 4, and what each process adds to the queue in a step. Default 64.
        loss_weight: A number or a schedule. Default 1.
        teacher_layer: The teacher's layer, where its name differs.
        match: ``'stride'`` or ``'index'``: which levels belong together, see
            :class:`mmkd.distillers.levels.LevelPairs`.

    Raises:
        ConfigError: for less than 4 samples: a single image would have one cell, which has no relation.

    Example:
        >>> distillers = dict(crcd=dict(type='CRCD', layer='backbone.layer4'))
    """

    least = 2

    def __init__(
        self,
        layer: str | Sequence[str],
        channels: int = 128,
        tau: float = 0.05,
        memory: int = 500,
        samples: int = 64,
        loss_weight: float | Mapping = 1.0,
        teacher_layer: str | Sequence[str] | None = None,
        match: str = 'stride',
    ):
        super().__init__(layer, channels, tau, memory, samples, loss_weight, teacher_layer, match)
        if samples < 4:
            raise ConfigError(
                f'samples={samples!r}: expected at least 4; of fewer an image has a single cell, without any relation'
            )

    def scores(
        self, student: torch.Tensor, teacher: torch.Tensor, memory: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return relation_scores(student, teacher, memory, self.tau)
