"""Soft targets (KD) for every pixel of a segmentor, every slot of a dense detector, every region of a RoI head.

Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv 1503.02531, applied to each position.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from mmkd.distillers.base import Distiller
from mmkd.distillers.levels import layer_names
from mmkd.distillers.schedule import Weight
from mmkd.errors import ConfigError
from mmkd.hosts.class_logits import ClassLogits, LogitsReader
from mmkd.hosts.segmentation.logits import PixelLogits
from mmkd.registry import DISTILLERS
from mmkd.taps import Taps
from mmkd.values import check_temperature

REDUCTIONS = ('pixel_mean', 'image_sum', 'element_mean', 'sum')


def pixel_divergence(
    student: torch.Tensor,
    teacher: torch.Tensor,
    tau: float = 1.0,
    reduction: str = 'pixel_mean',
    valid: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
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

    With ``weights`` each position's divergence is multiplied by its own.

    A weight w of ``pixel_mean`` is the weight w/B of ``image_sum``, w*K of ``element_mean`` and w/(B*A) of ``sum``.
    With ``valid``, positions are counted that are; nothing valid gives 0.

    Args:
        student: (B, K, H, W) logits; or (n, K), of which each is a position and an image.
        teacher: The same shape; no gradient flows into it.
        tau: Temperature.
        reduction: One of the names above.
        valid: (B, H, W) bool; None for all.
        weights: (B, H, W), of each position; None for 1.

    Returns:
        A scalar.
    """
    batch, classes = student.shape[:2]
    student = F.log_softmax(student / tau, dim=1)
    teacher = F.log_softmax(teacher.detach() / tau, dim=1)
    each = F.kl_div(student, teacher, reduction='none', log_target=True).sum(1)
    each = each.flatten(1) if each.dim() > 1 else each[:, None]
    if weights is not None:
        each = each * (weights.flatten(1) if weights.dim() > 1 else weights[:, None])
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


def binary_divergence(
    student: torch.Tensor, teacher: torch.Tensor, tau: float = 1.0, weights: torch.Tensor | None = None
) -> torch.Tensor:
    r"""Kullback-Leibler divergence between the two networks' probabilities of each class, for sigmoid scores.

    .. math::
        L = \frac{\tau^2}{D} \sum_{b, a, c} w_{bac} \Big( p^T \log \frac{p^T}{p^S} + (1 - p^T) \log \frac{1 - p^T}{1 - p^S}
        \Big)_{bac}, \qquad p = \sigma(z / \tau), \qquad D = \max\Big(1, \sum_{b, a} \max_c \sigma(z^T_{bac})\Big)

    D is how much of the images the teacher takes for objects, as most slots are background and a mean over all would be
    next to nothing.

    Args:
        student: (B, C, slots) logits.
        teacher: The same shape; no gradient flows into it.
        tau: Temperature.
        weights: The same shape; None for 1.

    Returns:
        A scalar.
    """
    teacher = teacher.detach()
    divisor = teacher.amax(1).sigmoid().sum().clamp(min=1)
    target = (teacher / tau).sigmoid()
    # the cross entropy less the teacher's own, which is the divergence and 0 for equal logits
    own, best = (
        F.binary_cross_entropy_with_logits(each / tau, target, reduction='none') for each in (student, teacher)
    )
    each = own - best
    if weights is not None:
        each = each * weights
    return each.sum() / divisor * tau**2


def logits_reader(
    student: nn.Module,
    layer: str | Sequence[str] | None,
    teacher_layer: str | Sequence[str] | None,
    label_size: bool = False,
    use_labels: bool = True,
    method: str = 'KD',
) -> LogitsReader:
    """What reads the class logits of a student's head, see :class:`KD` for the options; ``method`` compares them, for errors.

    Raises:
        ConfigError: for several heads of a detector, and for options that its head does not have.
    """
    if hasattr(student, 'decode_head'):
        return PixelLogits(layer, teacher_layer, label_size, use_labels)
    from mmkd.hosts.detection.logits import RegionLogits, SlotLogits  # segmentation needs no mmdet

    head = layer or ('roi_head' if hasattr(student, 'roi_head') else 'bbox_head')
    if not isinstance(head, str) or not isinstance(teacher_layer, str | None):
        raise ConfigError(
            f"layer={head!r}: of a detector one head is compared, such as 'bbox_head'; give each an entry of its own"
        )
    for option, value, default in (('label_size', label_size, False), ('use_labels', use_labels, True)):
        if value != default:
            raise ConfigError(
                f'{option}={value!r}: is of the pixels of a segmentor, and the student is a {type(student).__name__}; '
                f'leave it out'
            )
    if head != 'roi_head':
        return SlotLogits(head, teacher_layer or head)
    if teacher_layer is not None:
        raise ConfigError(
            f"teacher_layer={teacher_layer!r}: the teacher's regions are pooled from its 'neck', for its {head!r}; leave it out"
        )
    return RegionLogits(head, method=method)


@DISTILLERS.register_module()
class KD(Distiller):
    """Soft targets at every position, see :func:`pixel_divergence` and :func:`binary_divergence`; ``docs/methods/kd.md``.

    ``loss = loss_weight * divergence``, between the class logits of both networks.

    **Segmentors**: :func:`pixel_divergence`, summed over layers. Where the logits differ in size the student's are resized to
    the teacher's. Positions are left out whose label the student's decode head ignores (255), padding included.

    **Dense heads** with sigmoid scores (RetinaNet, FCOS, GFL, an RPN): :func:`binary_divergence` over all slots.

    **RoI heads** with softmax scores (Faster R-CNN): :func:`pixel_divergence` over the student's own regions, over which the
    teacher's RoI head is run as well; the background is a class.

    A teacher of other classes works where its ``classes`` say which are which (:func:`mmkd.classes.class_map`): the shared
    ones are compared; a softmax is taken over them alone, and of a RoI head over them and the background.

    Args:
        layer: A segmentor's layer that puts out class logits, or a list; a detector's head. Default: the decode head's,
            ``'decode_head.conv_seg'`` or of a cascade ``'decode_head.1.conv_seg'``; a two-stage detector's ``'roi_head'``;
            ``'bbox_head'``.
        tau: Temperature, positive. Default 1.
        loss_weight: A number or a schedule. Default 1.
        reduction: ``'pixel_mean'`` (default), ``'image_sum'``, ``'element_mean'`` or ``'sum'``, of softmax scores; of a RoI
            head each region is a pixel.
        label_size: Whether a segmentor's logits are first resized (bilinear, with the decode head's ``align_corners``) to
            the size of the labels. Default False: they are compared at the size of the logits.
        use_labels: Whether ignored pixels are left out. Default True. False needs no ground truth, but for
            ``label_size``.
        teacher_layer: The teacher's layer or dense head, where its name differs from ``layer``. Default, without either: as
            ``layer``. Not for a RoI head, for which the teacher's regions are pooled from its ``'neck'``.

    Raises:
        ConfigError: for heads that do not put out logits of the same classes, or at the same positions, and for options that
            are not of the student's head.

    Example:
        >>> distillers = dict(kd=dict(type='KD'))
    """

    maps_classes = any_scale = True
    renamed = {'weight': 'loss_weight'}

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
        super().__init__()
        check_temperature(tau)
        if reduction not in REDUCTIONS:
            raise ConfigError(f'reduction={reduction!r}: expected one of {", ".join(REDUCTIONS)}')
        for option, value in (('layer', layer), ('teacher_layer', teacher_layer)):
            if value is not None:
                layer_names(option, value)
        self.layer, self.teacher_layer = layer, teacher_layer
        self.tau = tau
        self.loss_weight = Weight(loss_weight, 'loss_weight')
        self.reduction = reduction
        self.label_size = label_size
        self.use_labels = use_labels

    def prepare(self, student: nn.Module, teacher: nn.Module) -> None:
        self.reader = logits_reader(
            student, self.layer, self.teacher_layer, self.label_size, self.use_labels, type(self).__name__
        )
        self.reader.prepare(student, teacher)
        if self.reader.sigmoid and self.reduction != 'pixel_mean':
            raise ConfigError(
                f'reduction={self.reduction!r}: is of softmax scores, and those of {self.reader.student_layers[0]!r} are '
                f'sigmoid, whose sum is divided by how many objects the teacher sees; leave it out'
            )
        self.student_layers, self.teacher_layers = self.reader.student_layers, self.reader.teacher_layers

    def setup(self, student: Taps, teacher: Taps) -> None:
        self.reader.setup(student, teacher)

    def read(self, student: Taps, teacher: Taps, data_samples: list | None) -> list[ClassLogits]:
        """The class logits that are compared; an entry for each layer."""
        return [self.weigh(each, student, data_samples) for each in self.reader(student, teacher, data_samples)]

    def weigh(self, logits: ClassLogits, student: Taps, data_samples: list | None) -> ClassLogits:
        """Those of a layer with the weight of each position, which a subclass gives; the teacher's may be made of several."""
        return logits

    def compare_weighted(self, logits: Sequence[ClassLogits], weights: Sequence[torch.Tensor | None]) -> torch.Tensor:
        """The weighted loss, with a weight for each position, (P, ...), or of sigmoid scores for each class too, (P, K, ...)."""
        loss = 0.0
        for each, weight in zip(logits, weights, strict=True):
            if each.weights is not None:
                weight = each.weights if weight is None else each.weights * weight
            if each.sigmoid:
                loss = loss + binary_divergence(each.student, each.teacher, self.tau, weight)
            else:
                loss = loss + pixel_divergence(each.student, each.teacher, self.tau, self.reduction, each.valid, weight)
        return self.loss_weight() * loss

    def forward(self, student: Taps, teacher: Taps, data_samples: list | None) -> dict[str, torch.Tensor]:
        logits = self.read(student, teacher, data_samples)
        return {'loss': self.compare_weighted(logits, [None] * len(logits))}
