"""Relations between and within classes (DIST), for every pixel.

Huang, You, Wang, Qian, Xu, "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022, arXiv 2205.10536.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from mmkd.distillers.base import Distiller
from mmkd.distillers.levels import LevelPairs
from mmkd.distillers.schedule import Weight
from mmkd.hosts.segmentation.heads import logits_layer
from mmkd.hosts.segmentation.labels import labeled
from mmkd.hosts.segmentation.logits import compared_logits, require_class_logits
from mmkd.registry import DISTILLERS
from mmkd.taps import Taps
from mmkd.values import check_temperature

EPS = 1e-8


def correlation(a: torch.Tensor, b: torch.Tensor, dim: int) -> torch.Tensor:
    r"""Pearson correlation along one dimension, of values whose mean along it is 0 already.

    .. math:: \rho = \frac{\sum_i a_i b_i}{\lVert a \rVert \lVert b \rVert + \epsilon}

    with epsilon 1e-8, as the authors have it. It is 0, with a finite gradient, where either is constant, and nearly so where
    the product of both lengths is far below epsilon.

    Args:
        a: Any shape, centred.
        b: The same shape, centred.
        dim: The dimension that i runs over.

    Returns:
        The shape without ``dim``, of -1 to 1.
    """
    # the norm's gradient at 0 is 0, where that of the root of a sum of squares is NaN
    lengths = [torch.linalg.vector_norm(each, dim=dim) for each in (a, b)]
    return (a * b).sum(dim) / (lengths[0] * lengths[1] + EPS)


def relation_losses(
    student: torch.Tensor, teacher: torch.Tensor, tau: float = 1.0, valid: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""How far the two networks' class probabilities are from linear functions of each other, by pixel and by class.

    With P the probabilities as a matrix of one row for each valid pixel of the batch and one column for each of K classes,

    .. math::
        P = \operatorname{softmax}_k(z / \tau), \qquad
        L_\text{inter} = \frac{1}{V} \sum_{i=1}^{V} \bigl(1 - \rho(P^S_{i \cdot}, P^T_{i \cdot})\bigr), \qquad
        L_\text{intra} = \frac{1}{K} \sum_{k=1}^{K} \bigl(1 - \rho(P^S_{\cdot k}, P^T_{\cdot k})\bigr)

    rho is :func:`correlation`. Both are 0 for equal inputs, but for 1 / K for each class whose probability is the same at
    all pixels: nothing correlates with it. L_inter is 0 without valid pixels, L_intra with less than two of them.

    Args:
        student: (B, K, H, W) logits.
        teacher: The same shape; no gradient flows into it.
        tau: Temperature.
        valid: (B, H, W) bool; None for all.

    Returns:
        L_inter and L_intra, scalars from 0 to 2.
    """
    rows = [(each / tau).softmax(1).movedim(1, -1).flatten(0, 2) for each in (student, teacher.detach())]
    inter = 1 - correlation(*(each - each.mean(1, keepdim=True) for each in rows), dim=1)
    valid = torch.ones_like(rows[0][:, :1]) if valid is None else valid.flatten()[:, None].to(rows[0].dtype)
    number = valid.sum()
    count = number.clamp(min=1)
    columns = [(each - (each * valid).sum(0) / count) * valid for each in rows]
    intra = (1 - correlation(*columns, dim=0).mean()) * (number > 1)
    return (inter * valid[:, 0]).sum() / count, intra


@DISTILLERS.register_module()
class DIST(Distiller):
    """Relations between the classes of a pixel and within a class over all pixels; ``docs/methods/dist.md``.

    ``loss_inter = inter_weight * L_inter`` and ``loss_intra = intra_weight * L_intra``, see :func:`relation_losses`,
    between the class logits of both networks, summed over layers. Where the logits differ in size the student's are
    resized to the teacher's. The pixels of all images of a process make one column. Positions are left out whose label
    the student's decode head ignores (255), padding included.

    Args:
        layer: The student's layer that puts out class logits, or a list. Default: its decode head's,
            ``'decode_head.conv_seg'`` or of a cascade ``'decode_head.1.conv_seg'``.
        inter_weight: Of the relation between classes, the paper's beta; a number or a schedule. Default 1.
        intra_weight: Of the relation within classes, the paper's gamma; a number or a schedule. Default 1.
        tau: Temperature, positive. Default 1.
        teacher_layer: The teacher's layer, where its name differs from ``layer``. Default, without either: as ``layer``.
        use_labels: Whether ignored pixels are left out. Default True. False needs no ground truth.

    Raises:
        ConfigError: for layers that do not put out logits of the same classes.

    Example:
        >>> distillers = dict(
        ...     dist=dict(type='DIST'),
        ...     auxiliary=dict(type='DIST', layer='auxiliary_head.conv_seg', inter_weight=0.4, intra_weight=0.4))
    """

    renamed = {
        'beta': 'inter_weight',
        'gamma': 'intra_weight',
        'weight': 'inter_weight and intra_weight',
        'loss_weight': 'inter_weight and intra_weight',
    }

    def __init__(
        self,
        layer: str | Sequence[str] | None = None,
        inter_weight: float | Mapping = 1.0,
        intra_weight: float | Mapping = 1.0,
        tau: float = 1.0,
        teacher_layer: str | Sequence[str] | None = None,
        use_labels: bool = True,
    ):
        super().__init__()
        self.levels = LevelPairs(layer or logits_layer, teacher_layer)
        check_temperature(tau)
        self.inter_weight = Weight(inter_weight, 'inter_weight')
        self.intra_weight = Weight(intra_weight, 'intra_weight')
        self.tau, self.use_labels = tau, use_labels

    def prepare(self, student: nn.Module, teacher: nn.Module) -> None:
        self.levels.prepare(student, teacher)
        self.student_layers, self.teacher_layers = self.levels.student_layers, self.levels.teacher_layers

    def setup(self, student: Taps, teacher: Taps) -> None:
        for layer, other in zip(self.student_layers, self.teacher_layers):
            require_class_logits(student, layer, teacher, other)
        self.levels.setup(student, teacher)

    def forward(self, student: Taps, teacher: Taps, data_samples: list | None) -> dict[str, torch.Tensor]:
        inter = intra = 0.0
        for s, t in compared_logits(self.levels, student, teacher):
            valid = labeled(student.model, data_samples, s.shape[2:]) if self.use_labels else None
            losses = relation_losses(s, t, self.tau, valid)
            inter, intra = inter + losses[0], intra + losses[1]
        return {'loss_inter': self.inter_weight() * inter, 'loss_intra': self.intra_weight() * intra}
