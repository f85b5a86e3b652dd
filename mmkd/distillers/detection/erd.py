"""Elastic response distillation (ERD): a detector learns new classes and keeps the old ones.

Feng, Wang, Yuan, "Overcoming Catastrophic Forgetting in Incremental Object Detection via Elastic Response Distillation",
CVPR 2022, arXiv 2204.02136.
"""

from collections.abc import Mapping

import torch
from torch import nn

from mmkd.distillers.base import Boxes, Distiller
from mmkd.distillers.detection.ld import distribution_divergence
from mmkd.distillers.levels import require_gradient
from mmkd.distillers.schedule import Weight
from mmkd.errors import ConfigError
from mmkd.hosts.detection.boxes import pairwise_iou
from mmkd.hosts.detection.dense_heads import DistributionDenseHead, check_same_slots, dense_head
from mmkd.registry import DISTILLERS
from mmkd.taps import Taps, find_layer
from mmkd.values import check_temperature, is_number

CANDIDATES = 1000
"""Of the slots that stand out of an image those that NMS looks at, the best first."""
ROUNDS = 32
"""Of :func:`apart`; random boxes need less than ten."""


def outstanding(confidence: torch.Tensor, inside: torch.Tensor, alpha: float = 2.0) -> torch.Tensor:
    r"""The slots whose confidence stands out of those of their image.

    .. math:: S_b = \{ i : c_{bi} > \mu_b + \alpha \sigma_b \}

    with mean and unbiased standard deviation over the image's slots. Of equal confidences none stands out.

    Args:
        confidence: c, (B, N).
        inside: (B, N), False for slots that take no part.
        alpha: How many standard deviations above the mean.

    Returns:
        (B, N), bool.
    """
    number = inside.sum(1, keepdim=True).clamp(min=1)
    mean = (confidence * inside).sum(1, keepdim=True) / number
    variance = ((confidence - mean).square() * inside).sum(1, keepdim=True) / (number - 1).clamp(min=1)
    return inside & (confidence > mean + alpha * variance.sqrt())


def apart(boxes: torch.Tensor, labels: torch.Tensor, valid: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    """Non-maximum suppression within each class, of boxes that are sorted by their scores.

    In each of :data:`ROUNDS` rounds all boxes stay that no better one overlaps which is still in question, and those that they
    overlap go. That is what the usual loop over boxes gives, in as many rounds as the longest chain of boxes of which
    each hangs on the one before. What is still in question after the last round goes.

    Args:
        boxes: (B, K, 4), xyxy, best first.
        labels: (B, K), their classes.
        valid: (B, K), False for a box that is not there.
        iou_threshold: A box that overlaps a better one of its class by more goes.

    Returns:
        (B, K), bool: which stay.
    """
    better = torch.ones(boxes.shape[1], boxes.shape[1], dtype=torch.bool, device=boxes.device).tril(-1)
    overlap = (pairwise_iou(boxes, boxes) > iou_threshold) & (labels[:, :, None] == labels[:, None]) & better
    kept, open_ = torch.zeros_like(valid), valid
    for _ in range(ROUNDS):
        new = open_ & ~(overlap & open_[:, None]).any(2)
        kept = kept | new
        open_ = open_ & ~new & ~(overlap & new[:, None]).any(2)
    return kept


def class_response_loss(student: torch.Tensor, teacher: torch.Tensor, selected: torch.Tensor) -> torch.Tensor:
    r"""Mean square of the difference of the old classes' logits at the selected slots, as a mean over images.

    .. math:: L = \frac{1}{B} \sum_b \frac{1}{|S_b| C} \sum_{i \in S_b} \sum_c (z^S_{bic} - z^T_{bic})^2

    An image without a selected slot counts 0.

    Args:
        student: (B, N, C), logits.
        teacher: The same shape; no gradient flows into it.
        selected: S, (B, N), bool.

    Returns:
        A scalar.
    """
    squared = (student - teacher.detach()).square().mean(2)
    return ((squared * selected).sum(1) / selected.sum(1).clamp(min=1)).mean()


def box_response_loss(divergence: torch.Tensor, score: torch.Tensor, selected: torch.Tensor) -> torch.Tensor:
    r"""Sum of the sides' divergences over the selected slots, as a mean over images.

    .. math:: L = \frac{1}{4 B} \sum_b \sum_{i \in R_b} p_{bi} \sum_{e=1}^4 D_{bie}

    Args:
        divergence: D, (B, N, 4), of each side.
        score: p, (B, N), the student's largest probability of an old class; no gradient flows into it.
        selected: R, (B, N), bool.

    Returns:
        A scalar.
    """
    return (divergence.sum(2) * score.detach() * selected).sum() / (4 * len(divergence))


@DISTILLERS.register_module()
class ERD(Distiller):
    """Elastic response distillation, for a GFL that learns more classes than its teacher, the old model, knows.

    The teacher's ``classes`` say which of the student's it knows. Only the slots that stand out of the old model's responses are
    learnt from, :func:`outstanding`, chosen for classes and boxes apart; no ground truth is read:

    - ``loss_cls``: :func:`class_response_loss` where the largest probability of an old class stands out.
    - ``loss_bbox``: :func:`box_response_loss` where the largest probability of a side's distribution stands out, of boxes
      that are :func:`apart`, with :func:`mmkd.distillers.detection.ld.distribution_divergence`.

    Also logs, per image, the number of slots that are learnt from for ``classes`` and for ``boxes``.

    The student's own losses should be of the new classes alone (``mmkd.LabelledFor``), and it should start from the old model
    (``inherit``). How this differs from the authors' code: ``docs/methods/erd.md``.

    Args:
        head: The student's dense head.
        alpha: How many standard deviations above the mean a response stands out. Default 2.
        tau: Temperature of the distances' distributions. Default 10.
        nms_iou: A box that overlaps a better one of its class by more is left out. Default 0.005.
        cls_weight: Weight of ``loss_cls``, a number or a schedule, as all weights. Default 2.
        bbox_weight: Weight of ``loss_bbox``. Default 0.5.
        teacher_head: The teacher's head, where its name differs.

    Example:
        >>> distillers = dict(erd=dict(type='ERD'))
    """

    maps_classes = True

    def __init__(
        self,
        head: str = 'bbox_head',
        alpha: float = 2.0,
        tau: float = 10.0,
        nms_iou: float = 0.005,
        cls_weight: float | Mapping = 2.0,
        bbox_weight: float | Mapping = 0.5,
        teacher_head: str | None = None,
    ):
        super().__init__()
        if not is_number(alpha):
            raise ConfigError(f'alpha={alpha!r}: expected a number of standard deviations')
        check_temperature(tau)
        if not (is_number(nms_iou) and 0 <= nms_iou <= 1):
            raise ConfigError(f'nms_iou={nms_iou!r}: expected a number from 0 to 1')
        self.head, self.teacher_head = head, teacher_head or head
        self.student_layers, self.teacher_layers = (self.head,), (self.teacher_head,)
        self.alpha, self.tau, self.nms_iou = alpha, tau, nms_iou
        self.cls_weight, self.bbox_weight = Weight(cls_weight, 'cls_weight'), Weight(bbox_weight, 'bbox_weight')

    def _heads(self, student: Taps, teacher: Taps) -> tuple[DistributionDenseHead, DistributionDenseHead]:
        return (
            dense_head(student.model.get_submodule(self.head)),
            dense_head(teacher.model.get_submodule(self.teacher_head)),
        )

    def prepare(self, student: nn.Module, teacher: nn.Module) -> None:
        heads = [dense_head(find_layer(*each)) for each in ((student, self.head), (teacher, self.teacher_head))]
        for each, whose in zip(heads, ('student', 'teacher')):
            if not isinstance(each, DistributionDenseHead):
                raise ConfigError(
                    f'{type(each.head).__name__} ({whose}) does not predict distributions of distances, which ERD compares; a '
                    f'GFLHead is needed in both models, or KD for other heads'
                )
        bins = [each.head.reg_max for each in heads]
        if bins[0] != bins[1]:
            raise ConfigError(
                f'the heads have reg_max {bins[0]} (student) and {bins[1]} (teacher), and ERD compares their distributions '
                f'bin by bin; give both the same'
            )

    def setup(self, student: Taps, teacher: Taps) -> None:
        s, t = self._heads(student, teacher)
        check_same_slots(
            (s, student[self.head]), (t, teacher[self.teacher_head]), 'ERD', boxes=False, classes=teacher.classes
        )

    @torch.no_grad()
    def select(
        self, student: Taps, teacher: Taps, logits: torch.Tensor, metas: list
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Where the student learns classes, and where boxes, (B, slots) bool each, and the teacher's boxes, (B, slots, 4).

        Args:
            student: The student's taps, for its slots.
            teacher: The teacher's.
            logits: The teacher's class logits, (B, slots, C).
            metas: Each image's meta data.
        """
        s, t = self._heads(student, teacher)
        outputs = teacher[self.teacher_head]
        anchors = s.anchors(student[self.head])
        inside = s.inside(anchors, student[self.head], metas)
        score, label = logits.max(2)
        score = score.sigmoid()
        classes = outstanding(score, inside, self.alpha)
        sure = t.distributions(outputs).softmax(-1).amax((2, 3))
        boxes = t.decode(t.priors(outputs), t.regression(outputs))
        stands_out = outstanding(sure, inside, self.alpha)
        best, index = score.masked_fill(~stands_out, -1).topk(min(CANDIDATES, score.shape[1]), dim=1)
        chosen = boxes.gather(1, index[..., None].expand(-1, -1, 4))
        kept = apart(chosen, label.gather(1, index), best >= 0, self.nms_iou)
        return classes, torch.zeros_like(classes).scatter(1, index, kept), boxes

    def pictures(self, student: Taps, teacher: Taps, data_samples: list | None) -> dict[str, Boxes]:
        metas = [sample.metainfo for sample in data_samples]
        _, selected, boxes = self.select(student, teacher, self._logits(student, teacher)[1], metas)
        chosen, index = selected.float().topk(min(100, selected.shape[1]), dim=1)
        return {'old boxes that are learnt': Boxes(boxes.gather(1, index[..., None].expand(-1, -1, 4)), chosen > 0)}

    def _logits(self, student: Taps, teacher: Taps) -> list[torch.Tensor]:
        """The class logits of both networks for the classes that both know, (B, slots, C)."""
        heads = self._heads(student, teacher)
        outputs = student[self.head], teacher[self.teacher_head]
        own, other = (head.slot_logits(each) for head, each in zip(heads, outputs))
        if teacher.classes is not None:
            own = teacher.classes.of_student(own.transpose(1, 2)).transpose(1, 2)
            other = teacher.classes.of_teacher(other.transpose(1, 2)).transpose(1, 2)
        return [own, other]

    def forward(self, student: Taps, teacher: Taps, data_samples: list | None) -> dict[str, torch.Tensor]:
        s, t = self._heads(student, teacher)
        s_out, t_out = student[self.head], teacher[self.teacher_head]
        require_gradient(self.head, [*s_out[0], *s_out[1]])
        own, old = self._logits(student, teacher)
        classes, boxes, _ = self.select(student, teacher, old, [sample.metainfo for sample in data_samples])
        divergence = distribution_divergence(s.distributions(s_out), t.distributions(t_out), self.tau)
        return {
            'loss_cls': self.cls_weight() * class_response_loss(own, old, classes),
            'loss_bbox': self.bbox_weight() * box_response_loss(divergence, own.amax(2).sigmoid(), boxes),
            'classes': classes.sum(1).float().mean(),
            'boxes': boxes.sum(1).float().mean(),
        }
