"""Attention-based feature distillation (AFD), "show, attend and distill".

Ji, Heo, Park, "Show, Attend and Distill: Knowledge Distillation via Attention-based Feature Matching", AAAI 2021, arXiv
2102.02973.
"""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from mmkd.distillers.base import Distiller
from mmkd.distillers.generic.at import attention_map
from mmkd.distillers.levels import layer_names, maps, require_gradient
from mmkd.distillers.relations import pool_cells
from mmkd.distillers.schedule import Weight
from mmkd.errors import ConfigError
from mmkd.registry import DISTILLERS
from mmkd.taps import Taps
from mmkd.values import is_whole


def matching_loss(
    student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor], shares: torch.Tensor
) -> torch.Tensor:
    r"""Distances between the attention maps of all pairs of levels, each pair with its share.

    .. math:: L = \sum_t \frac{1}{B} \sum_b \sum_s \alpha_{bts} \frac{1}{A_t} \sum_a (u^S_{bsa} - u^T_{bta})^2

    with u the mean over channels of the squared feature, of length 1 over the A positions of the teacher's level; the student's
    is averaged to its size first. See :func:`mmkd.distillers.generic.at.attention_map`.

    Args:
        student: Levels, (B, C, H, W) each, of any channels and sizes.
        teacher: Levels; no gradient flows into them.
        shares: alpha, (B, teacher's levels, student's levels).

    Returns:
        A scalar.
    """
    energies = [attention_map(level) for level in student]
    loss = shares.new_zeros(())
    for t, level in enumerate(teacher):
        target = F.normalize(attention_map(level.detach()).flatten(1))
        for s, energy in enumerate(energies):
            own = energy if energy.shape == level[:, :1].shape else pool_cells(energy, level.shape[2:])
            distance = (F.normalize(own.flatten(1)) - target).square().mean(1)
            loss = loss + (shares[:, t, s] * distance).mean()
    return loss


class Matching(nn.Module):
    r"""Which levels of the student each level of the teacher belongs to, for each image: attention between their means.

    .. math:: \alpha_{bt} = \operatorname{softmax}_s \frac{q_{bt}^\top \mathrm{LN}(W_t k_{bs}) + p_t^\top p_s}{\sqrt d}

    with q = LN(linear(mean over positions)) of the teacher's level t, k = ReLU(LN(linear(...))) of the student's level s; W, p,
    the linear maps and the norms are trained. Scores begin with a standard deviation of about 1.

    Args:
        student: The channels of the student's levels.
        teacher: Those of the teacher's.
        channels: d.
    """

    def __init__(self, student: Sequence[int], teacher: Sequence[int], channels: int):
        super().__init__()
        self.keys, self.queries = (
            nn.ModuleList(nn.Sequential(nn.Linear(each, channels), nn.LayerNorm(channels)) for each in widths)
            for widths in (student, teacher)
        )
        self.bilinear = nn.Parameter(torch.empty(len(teacher), channels, channels))
        self.places = nn.Parameter(torch.empty(len(student) + len(teacher), channels))
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in teacher)
        # one by one: of a stack torch takes the fans of a convolution
        for matrix in (*self.bilinear, *self.places.split([len(student), len(teacher)])):
            nn.init.xavier_normal_(matrix)

    def forward(self, student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor]) -> torch.Tensor:
        """(B, teacher's levels, student's levels), which sum to 1 over the student's."""
        keys, queries = (
            torch.stack([read(level.mean((2, 3))) for read, level in zip(readers, levels, strict=True)], 1)
            for readers, levels in ((self.keys, student), (self.queries, teacher))
        )
        own, other = self.places.split([len(self.keys), len(self.queries)])
        read = torch.einsum('tcd,bsd->btsc', self.bilinear, keys.relu())
        read = torch.stack([norm(each) for norm, each in zip(self.norms, read.unbind(1), strict=True)], 1)
        scores = torch.einsum('btc,btsc->bts', queries, read) + other @ own.mT
        return (scores / math.sqrt(self.places.shape[1])).softmax(2)


@DISTILLERS.register_module()
class AFD(Distiller):
    """Where levels are strong, compared of all pairs of levels; which belong together is learnt; ``docs/methods/afd.md``.

    ``loss = loss_weight * matching_loss``, see :class:`Matching` and :func:`matching_loss`. Numbers of levels, channels and
    sizes may differ. The matching is trained with the student and not needed afterwards. No ground truth. The loss is not 0 for
    equal networks.

    Args:
        layer: The student's layers, such as the stages of its backbone, or one of several levels.
        channels: d, of queries and keys. Default 128.
        loss_weight: beta, a number or a schedule. Default 200.
        teacher_layer: The teacher's layers, of any number. Default: as the student's.

    Raises:
        ConfigError: for a student with a single level.

    Example:
        >>> distillers = dict(afd=dict(type='AFD', layer=[f'backbone.layer{i}' for i in (1, 2, 3, 4)]))
    """

    any_scale = True

    def __init__(
        self,
        layer: str | Sequence[str],
        channels: int = 128,
        loss_weight: float | Mapping = 200.0,
        teacher_layer: str | Sequence[str] | None = None,
    ):
        super().__init__()
        if not (is_whole(channels) and channels >= 1):
            raise ConfigError(f'channels={channels!r}: expected a whole number of at least 1')
        self.student_layers = layer_names('layer', layer)
        self.teacher_layers = layer_names('teacher_layer', layer if teacher_layer is None else teacher_layer)
        self.channels = channels
        self.loss_weight = Weight(loss_weight, 'loss_weight')

    def setup(self, student: Taps, teacher: Taps) -> None:
        levels, others = all_maps(student, self.student_layers), all_maps(teacher, self.teacher_layers)
        if len(levels) < 2:
            raise ConfigError(
                f'layer={", ".join(self.student_layers)!r}: a single level, among which AFD has nothing to choose; name two '
                f'layers, or use AT'
            )
        self.matching = Matching([each.shape[1] for each in levels], [each.shape[1] for each in others], self.channels)

    def forward(self, student: Taps, teacher: Taps, data_samples: list | None) -> dict[str, torch.Tensor]:
        levels, others = all_maps(student, self.student_layers), all_maps(teacher, self.teacher_layers)
        require_gradient(', '.join(self.student_layers), levels)
        loss = matching_loss(levels, others, self.matching(levels, others))
        return {'loss': self.loss_weight() * loss}


def all_maps(taps: Taps, layers: Sequence[str]) -> list[torch.Tensor]:
    """The levels of several layers, (B, C, H, W) each.

    Raises:
        ConfigError: if a layer puts out something else.
    """
    levels = [level for layer in layers for level in maps(taps, layer)]
    for level in levels:
        if level.dim() != 4:
            raise ConfigError(f'{", ".join(layers)}: puts out {tuple(level.shape)}; expected (B, C, H, W) maps')
    return levels
