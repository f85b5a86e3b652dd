"""General Instance Distillation (GID).

Dai, Jiang, Wu, Bao, Wang, Liu, Zhou, "General Instance Distillation for Object Detection", CVPR 2021, arXiv 2103.02340.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from mmkd.adapters import Adapters
from mmkd.distillers.base import Boxes, Distiller
from mmkd.distillers.levels import maps, require_gradient
from mmkd.distillers.schedule import Weight
from mmkd.errors import ConfigError
from mmkd.hosts.detection.boxes import pairwise_iou
from mmkd.hosts.detection.dense_heads import DenseHead, check_levels, check_same_slots, dense_head
from mmkd.hosts.detection.roi_pool import pool_boxes
from mmkd.hosts.detection.rois import clip
from mmkd.registry import DISTILLERS
from mmkd.taps import Taps, find_layer
from mmkd.values import is_number, is_whole


def instance_scores(
    student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""How much the two networks differ at each slot, and which of them is surer there.

    .. math:: P(r) = \max_c |\sigma(z^T_{rc}) - \sigma(z^S_{rc})|

    Args:
        student: Class logits per level, (B, A, C, H, W).
        teacher: The same shapes.

    Returns:
        The scores, (B, slots), in [0, 1], and whether the teacher has the larger probability for the class at which
        the maximum is reached, (B, slots), bool.
    """
    scores, teacher_larger = [], []
    for s, t in zip(student, teacher):
        difference = t.sigmoid() - s.sigmoid()
        above, below = difference.amax(2), -difference.amin(2)
        scores.append(torch.maximum(above, below).permute(0, 2, 3, 1).flatten(1))
        teacher_larger.append((above >= below).permute(0, 2, 3, 1).flatten(1))
    return torch.cat(scores, 1), torch.cat(teacher_larger, 1)


def suppress(
    scores: torch.Tensor, boxes: torch.Tensor, iou_threshold: float, number: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Non-maximum suppression, the first ``number`` boxes of each image, for a batch at once.

    Greedy suppression needs only as many rounds as boxes are kept, so the whole batch takes ``number`` rounds of tensor
    operations, and nothing waits for the device.

    Args:
        scores: (B, N); -inf for a box that must not be taken.
        boxes: (B, N, 4), xyxy.
        iou_threshold: A box that overlaps a better one by more than this is dropped.
        number: Boxes to keep per image.

    Returns:
        Indices into N, (B, number), best first, and whether a box was left for each, (B, number), bool.
    """
    scores = scores.clone()
    kept, valid = [], []
    for _ in range(number):
        best, index = scores.max(1, keepdim=True)
        kept.append(index)
        valid.append(best > -torch.inf)
        chosen = boxes.gather(1, index[..., None].expand(-1, -1, 4))
        scores.masked_fill_(pairwise_iou(chosen, boxes).squeeze(1) > iou_threshold, -torch.inf)
        scores.scatter_(1, index, -torch.inf)
    return torch.cat(kept, 1), torch.cat(valid, 1)


def feature_loss(
    student: torch.Tensor, teacher: torch.Tensor, valid: torch.Tensor, distance: str = 'squared_l2'
) -> torch.Tensor:
    r"""Mean distance of the pooled features over instances and cells.

    .. math:: L = \frac{1}{n\,h\,w} \sum_{i=1}^n \lVert t_i - s_i \rVert_2^2
        \qquad\text{or, with } \texttt{distance='l2'}, \qquad \frac{1}{n} \sum_{i=1}^n \lVert t_i - s_i \rVert_2

    Args:
        student: (B, K, C, h, w), adapted.
        teacher: The same shape.
        valid: (B, K), False for an instance that is not there; n counts the others in the whole batch.
        distance: ``'squared_l2'`` or ``'l2'``.
    """
    squared = ((teacher - student) ** 2).flatten(2).sum(2)
    count = valid.sum().clamp(min=1)
    if distance == 'squared_l2':
        return (squared * valid).sum() / (count * student.shape[-1] * student.shape[-2])
    # the gradient of the root is infinite at 0, where the networks agree
    norm = torch.where(squared > 0, squared, 1.0).sqrt() * (squared > 0)
    return (norm * valid).sum() / count


def relation_loss(student: torch.Tensor, teacher: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    r"""Difference of the normalized distances between instances, within each group.

    .. math::
        L = \frac{1}{G} \sum_g \frac{1}{n(n-1)} \sum_{i \ne j}
            \operatorname{smooth}_{L1}\!\left(\frac{\lVert t_i - t_j \rVert}{\psi(t)},
            \frac{\lVert s_i - s_j \rVert}{\psi(s)}\right),
        \qquad \psi(e) = \frac{1}{n(n-1)} \sum_{i \ne j} \lVert e_i - e_j \rVert_2

    with smooth L1 of beta 1. Unchanged when all of a group's features are scaled; 0 for a group of fewer than two.

    Args:
        student: (G, K, ...), adapted; G groups (images) of at most K instances.
        teacher: The same shape.
        valid: (G, K), False for an instance that is not there.
    """
    pairs = valid[:, :, None] & valid[:, None] & ~torch.eye(valid.shape[1], dtype=torch.bool, device=valid.device)
    count = pairs.sum((1, 2)).clamp(min=1)

    def distances(features: torch.Tensor) -> torch.Tensor:
        # direct differences: their zeros are exact and have gradient 0, unlike those of |a|^2 + |b|^2 - 2ab
        flat = features.flatten(2)
        distance = torch.cdist(flat, flat, compute_mode='donot_use_mm_for_euclid_dist') * pairs
        mean = distance.sum((1, 2)) / count
        return distance / mean.clamp(min=1e-12)[:, None, None]

    difference = F.smooth_l1_loss(distances(student), distances(teacher), reduction='none')
    return ((difference * pairs).sum((1, 2)) / count).mean()


def response_losses(
    student_logits: Sequence[torch.Tensor],
    teacher_logits: Sequence[torch.Tensor],
    student_regression: torch.Tensor,
    teacher_regression: torch.Tensor,
    mask: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Difference of the heads' outputs at the slots of the mask.

    .. math::
        L_{cls} = \frac{1}{N_m} \sum_r M_r \sum_c \operatorname{KL}(\sigma(z^T_{rc}) \,\|\, \sigma(z^S_{rc})),
        \qquad L_{reg} = \frac{1}{N_m} \sum_r M_r \lVert b^T_r - b^S_r \rVert_1

    KL between Bernoulli distributions is the binary cross-entropy with the teacher's probability as target, less
    the target's entropy: the gradient is the same, and it is 0 where the networks agree (as the difference of two sums it
    may be off, either way, by their rounding).

    Args:
        student_logits: Per level (B, A, C, H, W).
        teacher_logits: The same shapes.
        student_regression: (B, slots, 4), in the head's unit (deltas).
        teacher_regression: The same shape and unit.
        mask: (B, slots), bool; N_m counts it over the batch.

    Returns:
        L_cls and L_reg, scalars.
    """
    count = mask.sum().clamp(min=1)
    sizes = [level[:, :, 0].numel() // len(level) for level in student_logits]
    classification = 0.0
    for s, t, slots in zip(student_logits, teacher_logits, mask.split(sizes, 1)):
        batch, anchors, _, height, width = s.shape
        slots = slots.view(batch, height, width, anchors).permute(0, 3, 1, 2)[:, :, None].to(s.dtype)
        with torch.no_grad():
            target = t.sigmoid()
            entropy = F.binary_cross_entropy_with_logits(t, target, slots, reduction='sum')
        cross_entropy = F.binary_cross_entropy_with_logits(s, target, slots, reduction='sum')
        classification = classification + cross_entropy - entropy
    regression = ((teacher_regression.detach() - student_regression).abs().sum(2) * mask).sum()
    return classification / count, regression / count


@DISTILLERS.register_module()
class GID(Distiller):
    """General Instance Distillation, for detectors with a dense head, and for the RPN of two-stage detectors.

    Selects, without ground truth, the instances at which the two networks differ most. At each slot the score is that of
    :func:`instance_scores` and the box that of the network that is surer; NMS and the first ``topk`` of each image follow.

    - ``loss_feature``: :func:`feature_loss` of the features that are pooled from the selected boxes.
    - ``loss_relation``: :func:`relation_loss` of the distances between these features.
    - ``loss_cls``, ``loss_bbox``: :func:`response_losses` of both heads' outputs, at the slots that the student's own
      assigner would give to the selected boxes.

    Also logs the number of ``instances`` per image. Origin of the defaults, differences from the authors' code, and which
    heads work: ``docs/methods/gid.md``.

    Args:
        layer: The layer whose levels are pooled, the one that the head reads.
        head: The dense head; of a two-stage detector ``'rpn_head'``.
        topk: Instances per image. Default 10.
        nms_iou: A box that overlaps a better one by more is dropped. Default 0.3.
        nms_pre: Slots per image that enter the NMS, best first. Default 3000.
        min_box_side: Boxes with a side of at most this many pixels, after clipping to the image, are not selected. Default 0.
        feature_weight: Weight of ``loss_feature``, a number or a schedule, as all weights. Default 5e-4.
        relation_weight: Weight of ``loss_relation``. Default 40.
        cls_weight: Weight of ``loss_cls``. Default 0.1.
        bbox_weight: Weight of ``loss_bbox``. Default 1.
        relation: Whether relations are taken within each ``'image'`` (default) or over the ``'batch'``.
        feature_distance: ``'squared_l2'`` (default) or ``'l2'``, see :func:`feature_loss`.
        pooled_size: Cells along each side of a pooled box. Default 10.
        sampling_ratio: Samples along each side of a cell. Default 2.
        adapter: ``'auto'`` (1x1 convolution exactly where channels differ), None or a dict. One serves all levels.
        teacher_layer: The teacher's layer, where its name differs.
        teacher_head: The teacher's head, where its name differs.

    Example:
        >>> distillers = dict(gid=dict(type='GID', topk=10))
    """

    renamed = {
        'neck': 'layer',
        'teacher_neck': 'teacher_layer',
        'class_weight': 'cls_weight',
        'box_weight': 'bbox_weight',
    }

    def __init__(
        self,
        layer: str = 'neck',
        head: str = 'bbox_head',
        topk: int = 10,
        nms_iou: float = 0.3,
        nms_pre: int = 3000,
        min_box_side: float = 0.0,
        feature_weight: float | Mapping = 5e-4,
        relation_weight: float | Mapping = 40.0,
        cls_weight: float | Mapping = 0.1,
        bbox_weight: float | Mapping = 1.0,
        relation: str = 'image',
        feature_distance: str = 'squared_l2',
        pooled_size: int = 10,
        sampling_ratio: int = 2,
        adapter: str | Mapping | None = 'auto',
        teacher_layer: str | None = None,
        teacher_head: str | None = None,
    ):
        super().__init__()
        if relation not in ('image', 'batch'):
            raise ConfigError(f"relation={relation!r}: expected 'image' or 'batch'")
        if feature_distance not in ('squared_l2', 'l2'):
            raise ConfigError(f"feature_distance={feature_distance!r}: expected 'squared_l2' or 'l2'")
        if not (is_whole(topk) and is_whole(nms_pre) and 1 <= topk <= nms_pre):
            raise ConfigError(f'topk={topk!r}, nms_pre={nms_pre!r}: expected whole numbers, 1 <= topk <= nms_pre')
        if not (is_number(nms_iou) and 0 <= nms_iou <= 1):
            raise ConfigError(f'nms_iou={nms_iou!r}: expected a number from 0 to 1')
        for name, value in (('pooled_size', pooled_size), ('sampling_ratio', sampling_ratio)):
            if not (is_whole(value) and value >= 1):
                raise ConfigError(f'{name}={value!r}: expected a whole number of at least 1')
        self.layer, self.head = layer, head
        self.teacher_layer, self.teacher_head = teacher_layer or layer, teacher_head or head
        self.student_layers = (self.layer, self.head)
        self.teacher_layers = (self.teacher_layer, self.teacher_head)
        self.topk, self.nms_iou, self.nms_pre, self.min_box_side = topk, nms_iou, nms_pre, min_box_side
        self.feature_weight = Weight(feature_weight, 'feature_weight')
        self.relation_weight = Weight(relation_weight, 'relation_weight')
        self.cls_weight, self.bbox_weight = Weight(cls_weight, 'cls_weight'), Weight(bbox_weight, 'bbox_weight')
        self.relation, self.feature_distance = relation, feature_distance
        self.pooled_size, self.sampling_ratio = pooled_size, sampling_ratio
        self.adapter = adapter

    def _heads(self, student: Taps, teacher: Taps) -> tuple[DenseHead, DenseHead]:
        return (
            dense_head(student.model.get_submodule(self.head)),
            dense_head(teacher.model.get_submodule(self.teacher_head)),
        )

    def prepare(self, student: nn.Module, teacher: nn.Module) -> None:
        dense_head(find_layer(student, self.head)).check_assigner()
        dense_head(find_layer(teacher, self.teacher_head))

    def setup(self, student: Taps, teacher: Taps) -> None:
        s, t = self._heads(student, teacher)
        check_same_slots((s, student[self.head]), (t, teacher[self.teacher_head]), 'GID')
        levels, targets = maps(student, self.layer), maps(teacher, self.teacher_layer)
        check_levels(self.layer, levels, self.head, s)
        check_levels(self.teacher_layer, targets, self.teacher_head, t, 'teacher')
        channels = levels[0].shape[1], targets[0].shape[1]
        self.adapters = Adapters.of_regions(self.adapter, *channels, (self.layer, self.teacher_layer))

    @torch.no_grad()
    def select(
        self, student: Taps, teacher: Taps, metas: Sequence[dict]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The general instances of each image.

        Returns:
            Boxes, (B, topk, 4), xyxy in pixels of the input; their scores, (B, topk); and which of them are there,
            (B, topk), bool.
        """
        s, t = self._heads(student, teacher)
        s_out, t_out = student[self.head], teacher[self.teacher_head]
        scores, teacher_larger = instance_scores(s.class_logits(s_out), t.class_logits(t_out))
        scores, slots = scores.topk(min(self.nms_pre, scores.shape[1]), dim=1)
        teacher_larger = teacher_larger.gather(1, slots)[..., None]
        index = slots[..., None].expand(-1, -1, 4)
        regression = torch.where(
            teacher_larger, t.regression(t_out).gather(1, index), s.regression(s_out).gather(1, index)
        )
        boxes = s.decode(s.priors(s_out)[slots], regression)
        boxes = clip(boxes, metas)
        sides = boxes[..., 2:] - boxes[..., :2]
        scores = scores.masked_fill((sides <= self.min_box_side).any(2), -torch.inf)
        kept, valid = suppress(scores, boxes, self.nms_iou, self.topk)
        boxes = boxes.gather(1, kept[..., None].expand(-1, -1, 4))
        return boxes, scores.gather(1, kept), valid

    def pictures(self, student: Taps, teacher: Taps, data_samples: list | None) -> dict[str, Boxes]:
        boxes, _, valid = self.select(student, teacher, [sample.metainfo for sample in data_samples])
        return {'selected instances': Boxes(boxes, valid)}

    def forward(self, student: Taps, teacher: Taps, data_samples: list | None) -> dict[str, torch.Tensor]:
        metas = [sample.metainfo for sample in data_samples]
        s, t = self._heads(student, teacher)
        require_gradient(self.layer, student[self.layer])
        boxes, _, valid = self.select(student, teacher, metas)

        pooled_s = pool_boxes(student[self.layer], boxes, s.strides, self.pooled_size, self.sampling_ratio)
        with torch.no_grad():
            pooled_t = pool_boxes(teacher[self.teacher_layer], boxes, s.strides, self.pooled_size, self.sampling_ratio)
        adapted = self.adapters([pooled_s.flatten(0, 1)], [pooled_t.flatten(0, 1)])[0].view_as(pooled_t)
        groups = (lambda each: each) if self.relation == 'image' else (lambda each: each.flatten(0, 1)[None])
        relation = relation_loss(groups(adapted), groups(pooled_t), groups(valid))

        s_out, t_out = student[self.head], teacher[self.teacher_head]
        classification, regression = response_losses(
            s.class_logits(s_out),
            t.class_logits(t_out),
            s.regression(s_out),
            t.regression(t_out),
            s.assigned(s_out, boxes, valid, metas),
        )
        return {
            'loss_feature': self.feature_weight() * feature_loss(adapted, pooled_t, valid, self.feature_distance),
            'loss_relation': self.relation_weight() * relation,
            'loss_cls': self.cls_weight() * classification,
            'loss_bbox': self.bbox_weight() * regression,
            'instances': valid.sum(1).float().mean(),
        }
