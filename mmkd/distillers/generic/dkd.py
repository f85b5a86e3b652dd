"""Decoupled knowledge distillation (DKD) of the classes of pixels and regions.

Zhao, Cui, Song, Qiu, Liang, "Decoupled Knowledge Distillation", CVPR 2022, arXiv 2203.08679.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from mmkd.distillers.base import Distiller
from mmkd.distillers.generic.kd import logits_reader
from mmkd.distillers.schedule import Weight
from mmkd.errors import ConfigError
from mmkd.registry import DISTILLERS
from mmkd.taps import Taps
from mmkd.values import check_temperature


def decoupled_divergence(
    student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, tau: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""The Kullback-Leibler divergence of class distributions in two parts: of the label's class, and among the others.

    .. math::
        L_\mathrm{TCKD} = \frac{\tau^2}{n} \sum_i \Big( p^T_i \log \frac{p^T_i}{p^S_i} + (1 - p^T_i) \log \frac{1 -
        p^T_i}{1 - p^S_i} \Big), \qquad
        L_\mathrm{NCKD} = \frac{\tau^2}{n} \sum_i \sum_{k \ne y_i} \hat p^T_{ik} \log \frac{\hat p^T_{ik}}{\hat p^S_{ik}}

    with i over the n positions that have a label y, p the probability of that class, softmax over all classes of the logits
    divided by tau, and p-hat the softmax over all but that class. KL of the whole is TCKD + (1 - p^T) NCKD, position by
    position. In the logarithms' space, so that networks that are sure of themselves stay finite. Zero for equal logits, and
    without any label; of two classes NCKD is 0.

    Args:
        student: (P, K, ...) logits, K at least 2.
        teacher: The same shape; no gradient flows into it.
        labels: (P, ...) int64, from 0 to K - 1, or -1 for a position that does not count.
        tau: Temperature.

    Returns:
        Two scalars, TCKD and NCKD.
    """
    classes = torch.arange(student.shape[1], device=labels.device).view(-1, *[1] * (labels.dim() - 1))
    target, counts = labels[:, None] == classes, labels >= 0

    def logarithms(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of p and 1 - p, (P, ...), and of p-hat, 0 at the target."""
        # not at the end: without a target the probability may be infinite, and 0 times that is NaN
        logits = torch.where(counts[:, None], logits / tau, 0.0)
        total, others = logits.logsumexp(1), logits.masked_fill(target, -torch.inf).logsumexp(1)
        own = logits.masked_fill(~target, 0.0).sum(1)
        return own - total, others - total, (logits - others[:, None]).masked_fill(target, 0.0)

    own, rest, among = logarithms(student)
    t_own, t_rest, t_among = logarithms(teacher.detach())
    binary = t_own.exp() * (t_own - own) + t_rest.exp() * (t_rest - rest)
    others = (t_among.exp() * (t_among - among)).sum(1)  # 0 at the target, where both are 0
    scale = tau**2 / counts.sum().clamp(min=1)
    return (binary * counts).sum() * scale, (others * counts).sum() * scale


@DISTILLERS.register_module()
class DKD(Distiller):
    """Soft targets in two parts, that of the label's class and that of all others; ``docs/methods/dkd.md``.

    ========= =========================================================================
    loss_tckd ``tckd_weight`` times the first part of :func:`decoupled_divergence`
    loss_nckd ``nckd_weight`` times the second
    ========= =========================================================================

    **Segmentors**: of every pixel that has a label, summed over layers. Where the logits differ in size the student's are
    resized to the teacher's.

    **RoI heads** with softmax scores (Faster R-CNN): of the student's own regions, over which the teacher's RoI head is run as
    well; a region's label is the one that the student's head is trained with, the background among them.

    Args:
        layer: A segmentor's layer that puts out class logits, or a list; ``'roi_head'``. Default: as
            :class:`mmkd.distillers.KD`.
        tckd_weight: alpha, a number or a schedule, as all weights. Default 1.
        nckd_weight: beta. Default 0.25.
        tau: Temperature, positive. Default 1.
        teacher_layer: The teacher's layer, where its name differs from ``layer``.

    Raises:
        ConfigError: for heads with sigmoid scores, each of which is a class and its opposite, so that nothing is left beside the
            target; and as KD does.

    Example:
        >>> distillers = dict(dkd=dict(type='DKD'))
    """

    any_scale = compares_classes = True

    def __init__(
        self,
        layer: str | Sequence[str] | None = None,
        tckd_weight: float | Mapping = 1.0,
        nckd_weight: float | Mapping = 0.25,
        tau: float = 1.0,
        teacher_layer: str | Sequence[str] | None = None,
    ):
        super().__init__()
        check_temperature(tau)
        self.layer, self.teacher_layer, self.tau = layer, teacher_layer, tau
        self.tckd_weight, self.nckd_weight = Weight(tckd_weight, 'tckd_weight'), Weight(nckd_weight, 'nckd_weight')

    def prepare(self, student: nn.Module, teacher: nn.Module) -> None:
        self.reader = logits_reader(student, self.layer, self.teacher_layer, method='DKD')
        self.reader.prepare(student, teacher)
        if self.reader.sigmoid:
            raise ConfigError(
                f'the head {self.reader.student_layers[0]!r} of {type(student).__name__} has sigmoid scores: beside its target a '
                f'class has no others, which DKD compares; use KD'
            )
        self.student_layers, self.teacher_layers = self.reader.student_layers, self.reader.teacher_layers
        self.training_layers = self.reader.label_layers

    def setup(self, student: Taps, teacher: Taps) -> None:
        self.reader.setup(student, teacher)

    def forward(self, student: Taps, teacher: Taps, data_samples: list | None) -> dict[str, torch.Tensor]:
        tckd, nckd = 0.0, 0.0
        for each in self.reader(student, teacher, data_samples):
            labels = self.reader.labels(each, student, data_samples)
            target, others = decoupled_divergence(each.student, each.teacher, labels, self.tau)
            tckd, nckd = tckd + target, nckd + others
        return {'loss_tckd': self.tckd_weight() * tckd, 'loss_nckd': self.nckd_weight() * nckd}
