"""Instance relationship graphs (IRG).

Liu, Cao, Li, Yuan, Hu, Li, Duan, "Knowledge Distillation via Instance Relationship Graph", CVPR 2019.
"""

import itertools
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F

from mmkd.distillers.relations import RelationDistiller, cell_weights, pool_cells, squared_distances
from mmkd.distillers.schedule import Weight
from mmkd.errors import ConfigError
from mmkd.registry import DISTILLERS
from mmkd.taps import Taps


def largest_is_one(values: torch.Tensor) -> torch.Tensor:
    """Values that are not negative, divided by the largest; zeros stay zeros."""
    largest = values.amax()
    return values / torch.where(largest > 0, largest, 1.0)


def edge_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    r"""Mean square of the difference between both networks' edges: squared distances of all pairs, the largest 1.

    .. math:: L = \frac{1}{n^2} \sum_{i, j} (E^S_{ij} - E^T_{ij})^2, \qquad
        E_{ij} = \frac{\lVert e_i - e_j \rVert^2}{\max_{k, l} \lVert e_k - e_l \rVert^2}

    Zero for equal inputs, and for less than two samples; unchanged when either is moved, turned or scaled.

    Args:
        student: e, (n, D), an embedding of each sample.
        teacher: (n, D'); no gradient flows into it.

    Returns:
        A scalar.
    """
    own, other = (largest_is_one(squared_distances(rows)) for rows in (student, teacher.detach()))
    return F.mse_loss(own, other)


def transformation_loss(
    student: tuple[torch.Tensor, torch.Tensor], teacher: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    r"""Mean square of the difference between how far both networks move each sample from one level to the next.

    .. math:: L = \frac{1}{n} \sum_i (V^S_i - V^T_i)^2, \qquad
        V_i = \frac{\lVert e_i - e'_i \rVert^2}{\max_k \lVert e_k - e'_k \rVert^2}

    with e of a level, e' of the next. Where a network's two differ, the larger one is averaged to the other's number of
    channels, over neighbouring ones, and its height and width so, over cells of positions.

    Args:
        student: e, (n, D), and e', (n, E); or maps, (n, C, H, W), of any channels and sizes.
        teacher: The same, of any; no gradient flows into it.

    Returns:
        A scalar.
    """

    def moves(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        channels, *size = (min(sides) for sides in zip(before.shape[1:], after.shape[1:], strict=True))
        before, after = (averaged(each, channels, size) for each in (before, after))
        return largest_is_one((before - after).square().flatten(1).sum(1))

    return F.mse_loss(moves(*student), moves(*(each.detach() for each in teacher)))


def averaged(feature: torch.Tensor, channels: int, size: Sequence[int]) -> torch.Tensor:
    """Means of neighbouring channels, and of the cells of a grid.

    Args:
        feature: (n, C) or (n, C, H, W).
        channels: How many channels it becomes.
        size: Height and width that a map becomes.

    Returns:
        (n, channels) or (n, channels, height, width).
    """
    if list(feature.shape[2:]) != list(size):
        feature = pool_cells(feature, size)
    if feature.shape[1] != channels:
        weights = cell_weights(feature.shape[1], channels, feature.new_ones(1))[0]
        feature = torch.einsum('dc,nc...->nd...', weights, feature)
    return feature


@DISTILLERS.register_module()
class IRG(RelationDistiller):
    """Distances of samples, and how levels move them, stay as they are in the teacher; ``docs/methods/irg.md``.

    =================== ===================================================================================================
    loss_edge           ``edge_weight`` times the mean over levels of :func:`edge_loss`
    loss_transformation ``transformation_weight`` times the mean over pairs of successive levels of
                        :func:`transformation_loss`; two levels or more are needed
    =================== ===================================================================================================

    The method's third part, its vertices, compares class logits: give :class:`mmkd.distillers.KD` an entry beside.

    Samples are images, cells of a grid or pixels, see :class:`mmkd.distillers.relations.RelationDistiller`; the relations are
    those within a process's batch. Numbers of channels may differ, nothing is trained beside the student, no ground truth.

    Args:
        layer: The student's layers, two or more, or one of several levels; levels succeed each other in this order.
        between: ``'cells'`` (default), ``'images'`` or ``'pixels'``.
        samples: Cells or pixels of a process's batch. Default 64. Memory grows with its square.
        edge_weight: A number or a schedule, as all weights. Default 5.
        transformation_weight: Default 5.
        teacher_layer: The teacher's layers, where their names differ.
        match: ``'stride'`` or ``'index'``: which levels belong together, see
            :class:`mmkd.distillers.levels.LevelPairs`.

    Raises:
        ConfigError: for a single level.

    Example:
        >>> distillers = dict(irg=dict(type='IRG', layer=['backbone.layer3', 'backbone.layer4']))
    """

    least = 2

    def __init__(
        self,
        layer: str | Sequence[str],
        between: str = 'cells',
        samples: int = 64,
        edge_weight: float | Mapping = 5.0,
        transformation_weight: float | Mapping = 5.0,
        teacher_layer: str | Sequence[str] | None = None,
        match: str = 'stride',
    ):
        super().__init__(layer, between, samples, teacher_layer, match)
        self.edge_weight = Weight(edge_weight, 'edge_weight')
        self.transformation_weight = Weight(transformation_weight, 'transformation_weight')

    def setup(self, student: Taps, teacher: Taps) -> None:
        super().setup(student, teacher)
        if len(self.levels.pairs) < 2:
            raise ConfigError(
                f'layer={", ".join(self.student_layers)!r}: a single level, and IRG compares how samples move from one to the '
                f'next; name two layers'
            )

    def forward(self, student: Taps, teacher: Taps, data_samples: list | None) -> dict[str, torch.Tensor]:
        levels = self.embeddings(student, teacher, data_samples)
        edges = sum(edge_loss(s.flatten(1), t.flatten(1)) for s, t in levels) / len(levels)
        moves = sum(transformation_loss((s, s2), (t, t2)) for (s, t), (s2, t2) in itertools.pairwise(levels)) / (
            len(levels) - 1
        )
        return {'loss_edge': self.edge_weight() * edges, 'loss_transformation': self.transformation_weight() * moves}
