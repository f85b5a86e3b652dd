"""Bridging cross-task protocol inconsistency (BCKD): binary class distillation and IoU-based localization distillation.

Yang et al., "Bridging Cross-task Protocol Inconsistency for Distillation in Dense Object Detection", ICCV 2023,
arXiv 2308.14286.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from mmdet.utils import reduce_mean
from torch import nn

from mmkd.distillers.base import Distiller
from mmkd.distillers.levels import require_gradient
from mmkd.distillers.schedule import Weight
from mmkd.hosts.detection.boxes import giou
from mmkd.hosts.detection.dense_heads import DenseHead, check_same_slots, dense_head
from mmkd.hosts.detection.ground_truth import ground_truth
from mmkd.registry import DISTILLERS
from mmkd.taps import Taps, find_layer


def binary_class_loss(student: torch.Tensor, teacher: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    r"""Binary cross-entropy with the teacher's probabilities, times how much the two differ.

    .. math:: L = \sum_i w_i \sum_c | p_{ic} - q_{ic} | \operatorname{BCE}(p_{ic}, q_{ic}), \qquad
        p = \sigma(z^S), \quad q = \sigma(z^T)

    The difference has a gradient, too. Zero for equal inputs.

    Args:
        student: (B, slots, C), class logits.
        teacher: The same shape; no gradient flows into it.
        weights: w, (B, slots).

    Returns:
        A scalar.
    """
    target = teacher.detach().sigmoid()
    entropy = F.binary_cross_entropy_with_logits(student, target, reduction='none')
    return ((entropy * (student.sigmoid() - target).abs()).sum(2) * weights).sum()


def box_loss(student: torch.Tensor, teacher: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    r"""Sum of 1 - GIoU.

    .. math:: L = \sum_i w_i (1 - \operatorname{GIoU}(b^S_i, b^T_i))

    Args:
        student: (B, slots, 4), xyxy in pixels.
        teacher: The same shape; no gradient flows into it.
        weights: w, (B, slots).

    Returns:
        A scalar.
    """
    return ((1 - giou(student, teacher.detach())) * weights).sum()


@torch.no_grad()
def positives(head: DenseHead, outputs: tuple, data_samples: list) -> torch.Tensor:
    """(B, slots), bool: the slots that the student's own assigner gives to the ground truth."""
    boxes, valid = ground_truth(data_samples)
    return head.assigned(outputs, boxes, valid, [sample.metainfo for sample in data_samples])


def mean_positives(positive: torch.Tensor) -> torch.Tensor:
    """Their number in a batch, mean over processes, at least 1."""
    return reduce_mean(positive.sum().float()).clamp(min=1)


@torch.no_grad()
def slots_of_levels_with_positives(positive: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """(1, slots), bool: those of levels that have a positive in any image of the batch."""
    levels = [level.any().expand(1, level.shape[1]) for level in positive.split(sizes, 1)]
    return torch.cat(levels, 1)


@DISTILLERS.register_module()
class BCKD(Distiller):
    """Compares class scores one by one, as heads with sigmoid scores are trained, and boxes by their IoU.

    - ``loss_cls``: :func:`binary_class_loss` over all slots.
    - ``loss_bbox``: :func:`box_loss` of the decoded boxes, each weighted by the largest difference of the class scores there,
      ``max_c |p - q|``, without gradient.

    Both are divided by the number of slots that the student's own assigner makes positive. Slots in the padding do not count, nor
    do levels without any positive, as in the authors' code: a batch without objects has the loss 0. More in
    ``docs/methods/bckd.md``.

    Args:
        head: The dense head, ``'bbox_head'`` (default) or, of a two-stage detector, ``'rpn_head'``.
        cls_weight: Weight of ``loss_cls``, a number or a schedule. Default 1.
        bbox_weight: Weight of ``loss_bbox``, a number or a schedule. Default 4.
        teacher_head: The teacher's head, where its name differs.

    Raises:
        ConfigError: for heads that do not predict the same classes at the same slots.

    Example:
        >>> distillers = dict(bckd=dict(type='BCKD'))
    """

    compares_classes = True

    def __init__(
        self,
        head: str = 'bbox_head',
        cls_weight: float | Mapping = 1.0,
        bbox_weight: float | Mapping = 4.0,
        teacher_head: str | None = None,
    ):
        super().__init__()
        self.head, self.teacher_head = head, teacher_head or head
        self.student_layers, self.teacher_layers = (self.head,), (self.teacher_head,)
        self.cls_weight, self.bbox_weight = Weight(cls_weight, 'cls_weight'), Weight(bbox_weight, 'bbox_weight')

    def prepare(self, student: nn.Module, teacher: nn.Module) -> None:
        dense_head(find_layer(student, self.head)).check_assigner()
        dense_head(find_layer(teacher, self.teacher_head))

    def _heads(self, student: Taps, teacher: Taps) -> tuple[DenseHead, DenseHead]:
        return (
            dense_head(student.model.get_submodule(self.head)),
            dense_head(teacher.model.get_submodule(self.teacher_head)),
        )

    def setup(self, student: Taps, teacher: Taps) -> None:
        s, t = self._heads(student, teacher)
        check_same_slots((s, student[self.head]), (t, teacher[self.teacher_head]), 'BCKD')

    def forward(self, student: Taps, teacher: Taps, data_samples: list | None) -> dict[str, torch.Tensor]:
        s, t = self._heads(student, teacher)
        own, other = student[self.head], teacher[self.teacher_head]
        require_gradient(self.head, [*own[0], *own[1]])
        positive = positives(s, own, data_samples)
        sizes = [level[0, :, 0].numel() for level in s.class_logits(own)]
        counted = slots_of_levels_with_positives(positive, sizes)
        counted = counted & s.in_image(own, [sample.metainfo for sample in data_samples])
        number = mean_positives(positive)
        s_logits, t_logits = s.slot_logits(own), t.slot_logits(other)
        boxes = [head.decode(head.priors(each), head.regression(each)) for head, each in ((s, own), (t, other))]
        difference = (s_logits.detach().sigmoid() - t_logits.sigmoid()).abs().amax(2)
        return {
            'loss_cls': self.cls_weight() * binary_class_loss(s_logits, t_logits, counted) / number,
            'loss_bbox': self.bbox_weight() * box_loss(*boxes, difference * counted) / number,
        }
