"""Mimic: features of proposals.

Li, Jin, Yan, "Mimicking Very Efficient Network for Object Detection", CVPR 2017.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from mmkd.adapters import Adapters
from mmkd.distillers.base import Distiller
from mmkd.distillers.levels import maps, require_gradient
from mmkd.distillers.schedule import Weight
from mmkd.errors import ConfigError
from mmkd.hosts.detection.dense_heads import dense_head
from mmkd.hosts.detection.roi_pool import pool_boxes
from mmkd.hosts.detection.rois import RoIHead, best_predictions, to_rois
from mmkd.registry import DISTILLERS
from mmkd.taps import Taps


def half_mean_square(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    r"""Half the mean square of the difference, as Mimic normalises regions by their size.

    .. math:: L = \frac{1}{2N} \sum_{i=1}^N \frac{1}{m_i} \lVert u_i - v_i \rVert_2^2

    Args:
        student: (N, ...), v.
        teacher: The same shape, u; m is the number of elements of one region.

    Returns:
        A scalar; 0 for no region at all.
    """
    return 0.5 * F.mse_loss(student, teacher, reduction='sum') / max(student.numel(), 1)


@DISTILLERS.register_module()
class Mimic(Distiller):
    """Makes the student's features of proposals equal to the teacher's, :func:`half_mean_square`.

    **Two-stage students**: the proposals are the RoIs that the student's own sampler drew (at most 512 per image in
    mmdet's configs), whose features it has pooled anyway; ``proposals='teacher'`` takes the teacher's RPN instead, as
    the authors' laboratory does in its later toolbox. **One-stage students**: name their ``head``; the proposals are
    its ``topk`` best predictions, pooled from the levels that their size gives.

    The second stage of the paper, ``class_weight`` and ``box_weight``, also compares what both box heads say of the same
    RoIs: mean square of the class logits and of the deltas (the weights of these terms are not known; off by default). Logs
    ``loss_feature`` and, where they are on, ``loss_class`` and ``loss_box``.

    The paper's transform layer is always there; here ``adapter='auto'`` adds a 1x1 convolution where channels differ,
    ``dict(type='ConvAdapter')`` adds it always. The paper's weight of 1 is from memory, unverified; the toolbox uses 1.

    Args:
        neck: The layer whose levels are pooled.
        head: A one-stage student's dense head. None (default) for a two-stage student.
        roi_head: A two-stage student's RoI head, and a two-stage teacher's.
        stage: The stage, where ``roi_head`` is a cascade.
        proposals: Whose: ``'student'`` or ``'teacher'``.
        topk: Proposals per image of a one-stage student. Default 100.
        weight: A number or a schedule, as all weights. Default 1.
        class_weight: Default 0, two-stage only.
        box_weight: Default 0, two-stage only.
        adapter: ``'auto'``, None or a dict. One for all levels.
        pooled_size: Cells along each side of a pooled box, for a one-stage student. Default 7.
        sampling_ratio: Samples along each side of a cell, for a one-stage student. Default 2.
        teacher_neck: The teacher's layer, where its name differs.

    Example:
        >>> distillers = dict(mimic=dict(type='Mimic'))                     # Faster R-CNN
        >>> distillers = dict(mimic=dict(type='Mimic', head='bbox_head'))   # RetinaNet, FCOS, ...
    """

    def __init__(
        self,
        neck: str = 'neck',
        head: str | None = None,
        roi_head: str = 'roi_head',
        stage: int | None = None,
        proposals: str = 'student',
        topk: int = 100,
        weight: float | Mapping = 1.0,
        class_weight: float | Mapping = 0.0,
        box_weight: float | Mapping = 0.0,
        adapter: str | Mapping | None = 'auto',
        pooled_size: int = 7,
        sampling_ratio: int = 2,
        teacher_neck: str | None = None,
    ):
        super().__init__()
        if proposals not in ('student', 'teacher'):
            raise ConfigError(f"proposals={proposals!r}: expected 'student' or 'teacher'")
        if not (isinstance(topk, int) and topk >= 1):
            raise ConfigError(f'topk={topk!r}: expected a whole number of at least 1')
        self.second_stage = bool(class_weight or box_weight)
        if head is not None and (self.second_stage or proposals == 'teacher'):
            raise ConfigError(
                f"head={head!r}: class_weight, box_weight and proposals='teacher' are for two-stage students"
            )
        self.neck, self.teacher_neck, self.head = neck, teacher_neck or neck, head
        self.roi_head = RoIHead(roi_head, stage)
        self.proposals, self.topk = proposals, topk
        self.weight, self.class_weight, self.box_weight = Weight(weight), Weight(class_weight), Weight(box_weight)
        self.adapter, self.pooled_size, self.sampling_ratio = adapter, pooled_size, sampling_ratio
        self.student_layers = (neck, head) if head else (neck, *self.roi_head.layers)
        self.teacher_layers = (self.teacher_neck,)
        if proposals == 'teacher':
            self.teacher_layers += ('rpn_head',)
        if self.second_stage:
            self.student_layers += (self.roi_head.bbox_head,)

    def setup(self, student: Taps, teacher: Taps) -> None:
        channels = [maps(taps, neck)[0].shape[1] for taps, neck in ((student, self.neck), (teacher, self.teacher_neck))]
        size = (self.pooled_size, self.pooled_size)
        if self.head:
            self.strides = dense_head(student.model.get_submodule(self.head)).strides
            pixels = student[self.neck][0].shape[-1] * self.strides[0]
            self.teacher_strides = [round(pixels / level.shape[-1]) for level in teacher[self.teacher_neck]]
            if len(self.strides) != len(student[self.neck]):
                raise ConfigError(
                    f'{self.neck!r} has {len(student[self.neck])} levels, {self.head!r} {len(self.strides)} strides'
                )
        else:
            self.roi_head.check(student, teacher)
            size = tuple(self.roi_head.features(student).shape[2:])
            channels = [each.model.get_submodule(self.roi_head.extractor).out_channels for each in (student, teacher)]
        if self.second_stage:
            self.roi_head.check_predictions(student, teacher, 'the second stage')
        pooled = [student[self.neck][0].new_zeros(1, each, *size) for each in channels]
        self.adapters = Adapters(self.adapter, pooled[:1], pooled[1:], (self.neck, self.teacher_neck))

    def compare(self, features: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The loss between the features of all proposals, (n, C, h, w), the student's already in the teacher's shape."""
        return half_mean_square(features, targets)

    def forward(self, student: Taps, teacher: Taps, data_samples: list | None) -> dict[str, torch.Tensor]:
        require_gradient(self.neck, student[self.neck])
        metas = [sample.metainfo for sample in data_samples]
        features, targets = (
            self._of_head(student, teacher, metas) if self.head else self._of_rois(student, teacher, metas)
        )
        (adapted,) = self.adapters([features], [targets])
        losses = {'loss_feature': self.weight() * self.compare(adapted, targets)}
        if self.second_stage:
            logits, deltas = student[self.roi_head.bbox_head]
            t_logits, t_deltas = self.roi_head.predict_teacher(teacher, targets)
            losses['loss_class'] = self.class_weight() * 2 * half_mean_square(logits, t_logits)
            losses['loss_box'] = self.box_weight() * 2 * half_mean_square(deltas, t_deltas)
        return losses

    def _of_head(self, student: Taps, teacher: Taps, metas: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
        head = dense_head(student.model.get_submodule(self.head))
        boxes = best_predictions(head, student[self.head], self.topk, metas)
        size = (self.pooled_size, self.sampling_ratio)
        features = pool_boxes(student[self.neck], boxes, self.strides, *size)
        with torch.no_grad():
            targets = pool_boxes(teacher[self.teacher_neck], boxes, self.teacher_strides, *size)
        return features.flatten(0, 1), targets.flatten(0, 1)

    def _of_rois(self, student: Taps, teacher: Taps, metas: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
        if self.proposals == 'student':
            rois, features = self.roi_head.rois(student), self.roi_head.features(student)
        else:
            rois = teacher_proposals(teacher, metas)
            features = self.roi_head.pool(student, self.neck, rois)
        return features, self.roi_head.pool_teacher(teacher, self.teacher_neck, rois)


@torch.no_grad()
def teacher_proposals(teacher: Taps, metas: list[dict]) -> torch.Tensor:
    """(n, 5): what the teacher's RPN would propose in training, after its NMS."""
    head = teacher.model.rpn_head
    cfg = teacher.model.train_cfg.get('rpn_proposal', teacher.model.test_cfg.rpn)
    results = head.predict_by_feat(*teacher['rpn_head'], batch_img_metas=metas, cfg=cfg, rescale=False)
    boxes = [each.bboxes for each in results]
    return torch.cat([to_rois(each[None]) + each.new_tensor([index, 0, 0, 0, 0]) for index, each in enumerate(boxes)])
