"""Soft targets for every pixel (KD), "pixel-wise distillation".

Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv 1503.02531, applied to each pixel.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F

from mmkd.distillers.base import FeatureDistiller
from mmkd.errors import ConfigError
from mmkd.hosts.segmentation.heads import logits_layer
from mmkd.hosts.segmentation.labels import ground_truth, labeled
from mmkd.hosts.segmentation.logits import compared_logits, require_class_logits
from mmkd.registry import DISTILLERS
from mmkd.taps import Taps
from mmkd.values import is_number

REDUCTIONS = ('pixel_mean', 'image_sum', 'element_mean', 'sum')


def pixel_divergence(
    student: torch.Tensor,
    teacher: torch.Tensor,
    tau: float = 1.0,
    reduction: str = 'pixel_mean',
    valid: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""Kullback-Leibler divergence between the two networks' class distributions of each pixel.

    .. math::
        Q = \sum_{b, a} v_{ba} \sum_k p^T_{bka} \log \frac{p^T_{bka}}{p^S_{bka}}, \qquad
        p_{bka} = \operatorname{softmax}_k(z_{bka} / \tau), \qquad
        L = \tau^2 Q / D

    a runs over positions, k over the K classes, v is 1 for valid positions. What public code calls "the KL" differs by
    the divisor D:

    ============== ============================================= =========================================
    reduction      D, for B images of A positions, all valid     who divides so
    ============== ============================================= =========================================
    pixel_mean     B A                                           CIRKD; as a cross-entropy loss does
    image_sum      A, of each image its own valid positions      SKD's authors
    element_mean   B A K                                         IFVD, TorchDistiller
    sum            1
    ============== ============================================= =========================================

    A weight w of ``pixel_mean`` is the weight w/B of ``image_sum``, w*K of ``element_mean`` and w/(B*A) of ``sum``.
    With ``valid``, positions are counted that are; nothing valid gives 0.

    Args:
        student: (B, K, H, W) logits.
        teacher: The same shape; no gradient flows into it.
        tau: Temperature.
        reduction: One of the names above.
        valid: (B, H, W) bool; None for all.

    Returns:
        A scalar.
    """
    batch, classes = student.shape[:2]
    student = F.log_softmax(student / tau, dim=1)
    teacher = F.log_softmax(teacher.detach() / tau, dim=1)
    each = F.kl_div(student, teacher, reduction='none', log_target=True).sum(1).flatten(1)
    if valid is None:
        count = torch.full((batch,), each.shape[1], device=each.device)
    else:
        each = each * valid.flatten(1)
        count = valid.flatten(1).sum(1)
    if reduction == 'image_sum':
        total = (each.sum(1) / count.clamp(min=1)).sum()
    elif reduction == 'sum':
        total = each.sum()
    else:
        total = each.sum() / count.sum().clamp(min=1)
        if reduction == 'element_mean':
            total = total / classes
    return total * tau**2


@DISTILLERS.register_module()
class KD(FeatureDistiller):
    """Soft targets for every pixel, see :func:`pixel_divergence`; ``docs/methods/kd.md``.

    ``loss = loss_weight * pixel_divergence``, between the class logits of both networks, summed over layers. Where the
    logits differ in size the student's are resized to the teacher's. Positions are left out whose label the student's
    decode head ignores (255), padding included.

    Args:
        layer: The student's layer that puts out class logits, or a list. Default: its decode head's,
            ``'decode_head.conv_seg'`` or of a cascade ``'decode_head.1.conv_seg'``.
        tau: Temperature, positive. Default 1.
        loss_weight: A number or a schedule. Default 1, for ``'pixel_mean'``.
        reduction: ``'pixel_mean'`` (default), ``'image_sum'``, ``'element_mean'`` or ``'sum'``.
        label_size: Whether both logits are first resized (bilinear, with the decode head's ``align_corners``) to the
            size of the labels. Default False: they are compared at the size of the logits.
        use_labels: Whether ignored pixels are left out. Default True. False needs no ground truth, but for
            ``label_size``.
        teacher_layer: The teacher's layer, where its name differs from ``layer``. Default, without either: as ``layer``.

    Raises:
        ConfigError: for layers that do not put out logits of the same classes.

    Example:
        >>> distillers = dict(kd=dict(type='KD'))
    """

    def __init__(
        self,
        layer: str | Sequence[str] | None = None,
        tau: float = 1.0,
        loss_weight: float | Mapping = 1.0,
        reduction: str = 'pixel_mean',
        label_size: bool = False,
        use_labels: bool = True,
        teacher_layer: str | Sequence[str] | None = None,
    ):
        super().__init__(layer or logits_layer, loss_weight, teacher_layer)
        if not (is_number(tau) and tau > 0):
            raise ConfigError(f'tau={tau!r}: expected a positive temperature')
        if reduction not in REDUCTIONS:
            raise ConfigError(f'reduction={reduction!r}: expected one of {", ".join(REDUCTIONS)}')
        self.tau = tau
        self.reduction = reduction
        self.label_size = label_size
        self.use_labels = use_labels

    def setup(self, student: Taps, teacher: Taps) -> None:
        for layer, other in zip(self.student_layers, self.teacher_layers):
            require_class_logits(student, layer, teacher, other)
        super().setup(student, teacher)

    def forward(self, student: Taps, teacher: Taps, data_samples: list | None) -> dict[str, torch.Tensor]:
        size = ground_truth(data_samples).shape[1:] if self.label_size else None
        loss = 0.0
        for s, t in compared_logits(self.levels, student, teacher, size):
            valid = labeled(student.model, data_samples, s.shape[2:]) if self.use_labels else None
            loss = loss + pixel_divergence(s, t, self.tau, self.reduction, valid)
        return {'loss': self.loss_weight() * loss}
