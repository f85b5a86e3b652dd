"""Mimic: features of proposals.

Li, Jin, Yan, "Mimicking Very Efficient Network for Object Detection", CVPR 2017.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from mmkd.adapters import Adapters
from mmkd.distillers.base import Distiller
from mmkd.distillers.levels import maps, require_gradient
from mmkd.distillers.schedule import Weight
from mmkd.errors import ConfigError
from mmkd.hosts.detection.dense_heads import check_levels, dense_head
from mmkd.hosts.detection.roi_pool import pool_boxes
from mmkd.hosts.detection.rois import (
    RoIHead,
    best_predictions,
    check_same_predictions,
    check_same_regions,
)
from mmkd.registry import DISTILLERS
from mmkd.taps import Taps, find_layer
from mmkd.values import is_whole


def mean_square(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean square of the difference of two tensors of one shape; 0, with gradient, where they are empty."""
    return F.mse_loss(student, teacher, reduction='sum') / max(student.numel(), 1)


def half_mean_square(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    r"""Half the mean square of the difference, as Mimic normalizes regions by their size.

    .. math:: L = \frac{1}{2N} \sum_{i=1}^N \frac{1}{m_i} \lVert u_i - v_i \rVert_2^2

    Args:
        student: (N, ...), v.
        teacher: The same shape, u; m is the number of elements of one region.

    Returns:
        A scalar; 0 for no region at all.
    """
    return 0.5 * mean_square(student, teacher)


@DISTILLERS.register_module()
class Mimic(Distiller):
    """Makes the student's features of proposals equal to the teacher's.

    - ``loss_feature``: :func:`half_mean_square` of the pooled features, the student's after an adapter.
    - ``loss_cls``, ``loss_bbox``: mean squares of what both box heads say of the same regions, class logits and deltas. They
      are the second stage of the paper, for two-stage students, and off by default.

    **Two-stage students.** The proposals are the RoIs that the student's own sampler drew, whose features it has pooled
    anyway. ``proposals='teacher'`` takes those of the teacher's RPN instead.

    **One-stage students.** Name their ``head``. The proposals are its ``topk`` best predictions, pooled from the levels that
    their size gives.

    Origin of the defaults, and what works: ``docs/methods/mimic.md``.

    Args:
        layer: The layer whose levels are pooled.
        head: A one-stage student's dense head. None (default) for a two-stage student.
        roi_head: The RoI head, of a two-stage student and of its teacher.
        stage: The student's stage, where its RoI head is a cascade.
        proposals: Whose proposals are compared, ``'student'`` (default) or ``'teacher'``.
        topk: Proposals per image of a one-stage student. Default 100.
        feature_weight: Weight of ``loss_feature``, a number or a schedule, as all weights. Default 1.
        cls_weight: Weight of ``loss_cls``. Default 0; for two-stage students.
        bbox_weight: Weight of ``loss_bbox``. Default 0; for two-stage students.
        adapter: ``'auto'`` (1x1 convolution exactly where channels differ), None or a dict. One serves all levels.
        pooled_size: Cells along each side of a pooled box, for a one-stage student. Default 7.
        sampling_ratio: Samples along each side of a cell, for a one-stage student. Default 2.
        teacher_layer: The teacher's layer, where its name differs.
        teacher_stage: The teacher's stage, where its RoI head is a cascade. Default: ``stage``.

    Example:
        >>> distillers = dict(mimic=dict(type='Mimic'))                     # Faster R-CNN
        >>> distillers = dict(mimic=dict(type='Mimic', head='bbox_head'))   # RetinaNet, FCOS, ...
    """

    renamed = {
        'neck': 'layer',
        'teacher_neck': 'teacher_layer',
        'weight': 'feature_weight',
        'class_weight': 'cls_weight',
        'box_weight': 'bbox_weight',
    }

    def __init__(
        self,
        layer: str = 'neck',
        head: str | None = None,
        roi_head: str = 'roi_head',
        stage: int | None = None,
        proposals: str = 'student',
        topk: int = 100,
        feature_weight: float | Mapping = 1.0,
        cls_weight: float | Mapping = 0.0,
        bbox_weight: float | Mapping = 0.0,
        adapter: str | Mapping | None = 'auto',
        pooled_size: int = 7,
        sampling_ratio: int = 2,
        teacher_layer: str | None = None,
        teacher_stage: int | None = None,
    ):
        super().__init__()
        if proposals not in ('student', 'teacher'):
            raise ConfigError(f"proposals={proposals!r}: expected 'student' or 'teacher'")
        for name, value in (('topk', topk), ('pooled_size', pooled_size), ('sampling_ratio', sampling_ratio)):
            if not (is_whole(value) and value >= 1):
                raise ConfigError(f'{name}={value!r}: expected a whole number of at least 1')
        self.compares_classes, self.compares_boxes = bool(cls_weight), bool(bbox_weight)
        compares_heads = self.compares_classes or self.compares_boxes
        if head is not None and (compares_heads or proposals == 'teacher'):
            raise ConfigError(
                f"head={head!r}: cls_weight, bbox_weight and proposals='teacher' are for two-stage students"
            )
        self.layer, self.teacher_layer, self.head = layer, teacher_layer or layer, head
        self.roi_head, self.teacher_stage = RoIHead(roi_head, stage), teacher_stage
        self.proposals, self.topk = proposals, topk
        self.feature_weight = Weight(feature_weight, 'feature_weight')
        self.cls_weight, self.bbox_weight = Weight(cls_weight, 'cls_weight'), Weight(bbox_weight, 'bbox_weight')
        self.adapter, self.pooled_size, self.sampling_ratio = adapter, pooled_size, sampling_ratio
        self.student_layers = (layer, head) if head else (layer, *self.roi_head.layers)
        self.teacher_layers = (self.teacher_layer,)
        if proposals == 'teacher':
            self.teacher_layers += ('rpn_head',)
        if compares_heads:
            self.student_layers += (self.roi_head.bbox_head,)

    def prepare(self, student: nn.Module, teacher: nn.Module) -> None:
        if self.head:
            dense_head(find_layer(student, self.head))
            return
        self.roi_head.check(student)
        heads = (self.roi_head, student), (self.roi_head.of_teacher(teacher, self.teacher_stage), teacher)
        check_same_regions(*heads)
        if self.compares_classes or self.compares_boxes:
            check_same_predictions(*heads, 'the second stage', self.compares_boxes)

    def setup(self, student: Taps, teacher: Taps) -> None:
        levels, targets = maps(student, self.layer), maps(teacher, self.teacher_layer)
        channels = levels[0].shape[1], targets[0].shape[1]
        if self.head:
            head = dense_head(student.model.get_submodule(self.head))
            check_levels(self.layer, levels, self.head, head)
            self.strides = head.strides
            pixels = levels[0].shape[-1] * self.strides[0]
            self.teacher_strides = [round(pixels / level.shape[-1]) for level in targets]
        else:
            self.teacher_roi_head = self.roi_head.of_teacher(teacher.model, self.teacher_stage)
            heads = (self.roi_head, student), (self.teacher_roi_head, teacher)
            channels = tuple(taps.model.get_submodule(each.extractor).out_channels for each, taps in heads)
        self.adapters = Adapters.of_regions(self.adapter, *channels, (self.layer, self.teacher_layer))

    def compare(self, features: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The loss between the features of all proposals, (n, C, h, w), the student's already in the teacher's shape."""
        return half_mean_square(features, targets)

    def forward(self, student: Taps, teacher: Taps, data_samples: list | None) -> dict[str, torch.Tensor]:
        require_gradient(self.layer, student[self.layer])
        metas = [sample.metainfo for sample in data_samples]
        features, targets = (
            self._of_head(student, teacher, metas) if self.head else self._of_rois(student, teacher, metas)
        )
        (adapted,) = self.adapters([features], [targets])
        losses = {'loss_feature': self.feature_weight() * self.compare(adapted, targets)}
        if not (self.compares_classes or self.compares_boxes):
            return losses
        logits, deltas = (
            student[self.roi_head.bbox_head]
            if self.proposals == 'student'
            else self.roi_head.predict(student, features)
        )
        with torch.no_grad():
            t_logits, t_deltas = self.teacher_roi_head.predict(teacher, targets)
        if self.compares_classes:
            losses['loss_cls'] = self.cls_weight() * mean_square(logits, t_logits)
        if self.compares_boxes:
            losses['loss_bbox'] = self.bbox_weight() * mean_square(deltas, t_deltas)
        return losses

    def _of_head(self, student: Taps, teacher: Taps, metas: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
        head = dense_head(student.model.get_submodule(self.head))
        boxes = best_predictions(head, student[self.head], self.topk, metas)
        size = (self.pooled_size, self.sampling_ratio)
        features = pool_boxes(student[self.layer], boxes, self.strides, *size)
        with torch.no_grad():
            targets = pool_boxes(teacher[self.teacher_layer], boxes, self.teacher_strides, *size)
        return features.flatten(0, 1), targets.flatten(0, 1)

    def _of_rois(self, student: Taps, teacher: Taps, metas: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
        if self.proposals == 'student':
            rois, features = self.roi_head.rois(student), self.roi_head.features(student)
        else:
            rois = teacher_proposals(teacher, metas)
            features = self.roi_head.pool(student, self.layer, rois)
        with torch.no_grad():
            return features, self.teacher_roi_head.pool(teacher, self.teacher_layer, rois)


@torch.no_grad()
def teacher_proposals(teacher: Taps, metas: list[dict]) -> torch.Tensor:
    """(n, 5): what the teacher's RPN would propose in training, after its NMS."""
    head = teacher.model.rpn_head
    cfg = teacher.model.train_cfg.get('rpn_proposal', teacher.model.test_cfg.rpn)
    results = head.predict_by_feat(*teacher['rpn_head'], batch_img_metas=metas, cfg=cfg, rescale=False)
    # the index of the image is filled in, as a tensor of it would be copied from the host, which waits for the device
    return torch.cat([F.pad(each.bboxes, (1, 0), value=index) for index, each in enumerate(results)])
