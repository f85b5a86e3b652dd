"""Knowledge distillation of two-stage detectors: classes, boxes and a hint.

Chen, Choi, Yu, Han, Chandraker, "Learning Efficient Object Detection Models with Knowledge Distillation", NeurIPS 2017.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from mmkd.distillers.base import Distiller
from mmkd.distillers.levels import LevelPairs
from mmkd.distillers.schedule import Weight
from mmkd.errors import ConfigError
from mmkd.hosts.detection.dense_heads import AnchorDenseHead, check_same_slots, dense_head
from mmkd.hosts.detection.rois import RoIHead, check_same_predictions, check_same_regions
from mmkd.registry import DISTILLERS
from mmkd.taps import INPUT, KWARGS, Taps, find_layer
from mmkd.values import is_number

ADAPTER = dict(type='ConvAdapter')


def weighted_divergence(
    student: torch.Tensor, teacher: torch.Tensor, bg_cls_weight: float = 1.5, tau: float = 1.0
) -> torch.Tensor:
    r"""Soft cross-entropy with a weight for the background, less the same of the teacher with itself.

    .. math::
        L = \sum_c w_c\, p^T_c \log \frac{p^T_c}{p^S_c}, \qquad p = \operatorname{softmax}(z / \tau), \qquad
        w_\text{background} = 1.5, \quad w_c = 1 \text{ else}

    The paper has the cross-entropy :math:`-\sum_c w_c\, p^T_c \log p^S_c`; what is taken off depends on the teacher
    alone, so the gradient is the same, and this is 0 where the networks agree. With a weight other than 1 that is not the
    minimum, which is at :math:`p^S_c \propto w_c\, p^T_c` and slightly below 0.

    Args:
        student: Logits, (..., classes + 1), the background last.
        teacher: The same shape; no gradient flows into it.
        bg_cls_weight: 1 gives the Kullback-Leibler divergence.
        tau: Divides both networks' logits.

    Returns:
        One value for each row, (...).
    """
    student = F.log_softmax(student / tau, -1)
    teacher = F.log_softmax(teacher.detach() / tau, -1)
    divergence = teacher.exp() * (teacher - student)
    return divergence.sum(-1) + (bg_cls_weight - 1) * divergence[..., -1]


def bounded_error(
    student: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor, margin: float = 0.0
) -> torch.Tensor:
    r"""The student's squared error, where it is not yet smaller than the teacher's by a margin.

    .. math::
        L = \begin{cases} \lVert r^S - y \rVert_2^2 & \text{if } \lVert r^S - y \rVert_2^2 + m > \lVert r^T - y \rVert_2^2
            \\ 0 & \text{else} \end{cases}

    0 for equal networks and m = 0; it is a step, so that there a rounding error may give the student's whole error instead.

    Args:
        student: Deltas, (..., 4).
        teacher: The same shape; no gradient flows into it. It is a bound, never a target.
        target: The same shape, the deltas of the ground truth.
        margin: m, how much smaller than the teacher's error the student's has to be.

    Returns:
        One value for each row, (...).
    """
    error = (student - target).square().sum(-1)
    bound = (teacher.detach() - target).square().sum(-1)
    return error * (error.detach() + margin > bound)


@DISTILLERS.register_module()
class Chen(Distiller):
    r"""The first distillation of two-stage detectors: soft classes, bounded boxes and a hint.

    - ``loss_rpn_cls``, ``loss_rpn_bbox``: at the anchors that the student's own RPN loss sampled. The objectness is taken
      as two classes, object and background.
    - ``loss_cls``, ``loss_bbox``: at the RoIs that the student's own sampler drew, for which the teacher is run as well.
      Boxes are compared at the positive RoIs, in the deltas of the assigned class.
    - ``loss_hint``: mean square of the difference of the hint layers, added over levels.

    The class losses are :func:`weighted_divergence`, the box losses :func:`bounded_error`. Each has the divisor and, beside
    its own weight, the ``loss_weight`` of the student's loss of the same name.

    The paper weighs hard and soft class losses by :math:`\mu` and :math:`1 - \mu`. The student's own loss keeps its weight
    here, so this is ``cls_weight`` :math:`= (1 - \mu) / \mu`. Origin of the defaults: ``docs/methods/chen.md``.

    Args:
        layer: The layer that RoIs are pooled from.
        rpn_head: The RPN's name, in both networks.
        roi_head: The RoI head's name, in both networks.
        stage: The student's stage, where its RoI head is a cascade.
        rpn_cls_weight: Weight of ``loss_rpn_cls``, a number or a schedule, as all weights. Default 1.
        rpn_bbox_weight: Weight of ``loss_rpn_bbox``. Default 0.5.
        cls_weight: Weight of ``loss_cls``. Default 1.
        bbox_weight: Weight of ``loss_bbox``. Default 0.5.
        hint_weight: Weight of ``loss_hint``. Default 0.5.
        margin: The teacher bounds the student until it is better by this much, in squared deltas. Default 0.
        bg_cls_weight: Weight of the background in the class losses. Default 1.5.
        tau: Temperature of the class losses. Default 1.
        hint_layer: The layer of the hint, or a list of layers. Default: ``layer``.
        adapter: A dict; ``'auto'`` (1x1 convolution exactly where channels differ) or None. By default a 1x1 convolution,
            for equal channels too.
        teacher_layer: The teacher's layer, where its name differs.
        teacher_hint_layer: The teacher's hint layer, where its name differs.
        teacher_stage: The teacher's stage, where its RoI head is a cascade. Default: ``stage``.

    Example:
        >>> distillers = dict(chen=dict(type='Chen'))
    """

    compares_classes = True
    renamed = {
        'neck': 'layer',
        'teacher_neck': 'teacher_layer',
        'mu': 'cls_weight = rpn_cls_weight = (1 - mu) / mu',
        'nu': 'bbox_weight and rpn_bbox_weight',
        'rcn_weight': 'cls_weight and bbox_weight',
        'background_weight': 'bg_cls_weight',
        'temperature': 'tau',
    }

    def __init__(
        self,
        layer: str = 'neck',
        rpn_head: str = 'rpn_head',
        roi_head: str = 'roi_head',
        stage: int | None = None,
        rpn_cls_weight: float | Mapping = 1.0,
        rpn_bbox_weight: float | Mapping = 0.5,
        cls_weight: float | Mapping = 1.0,
        bbox_weight: float | Mapping = 0.5,
        hint_weight: float | Mapping = 0.5,
        margin: float = 0.0,
        bg_cls_weight: float = 1.5,
        tau: float = 1.0,
        hint_layer: str | Sequence[str] | None = None,
        adapter: str | Mapping | None = ADAPTER,
        teacher_layer: str | None = None,
        teacher_hint_layer: str | Sequence[str] | None = None,
        teacher_stage: int | None = None,
    ):
        super().__init__()
        for name, value in (('bg_cls_weight', bg_cls_weight), ('tau', tau)):
            if not (is_number(value) and value > 0):
                raise ConfigError(f'{name}={value!r}: expected a positive number')
        if not (is_number(margin) and margin >= 0):
            raise ConfigError(f'margin={margin!r}: expected a number of at least 0')
        self.teacher_layer = teacher_layer or layer
        other = teacher_hint_layer or hint_layer or self.teacher_layer
        self.hint = LevelPairs(hint_layer or layer, other, adapter)
        self.rpn_head, self.roi_head, self.teacher_stage = rpn_head, RoIHead(roi_head, stage), teacher_stage
        self.rpn_cls_weight = Weight(rpn_cls_weight, 'rpn_cls_weight')
        self.rpn_bbox_weight = Weight(rpn_bbox_weight, 'rpn_bbox_weight')
        self.cls_weight, self.bbox_weight = Weight(cls_weight, 'cls_weight'), Weight(bbox_weight, 'bbox_weight')
        self.hint_weight = Weight(hint_weight, 'hint_weight')
        self.margin, self.bg_cls_weight, self.tau = margin, bg_cls_weight, tau
        self.student_layers = (*self.hint.student_layers, rpn_head, *self.roi_head.layers, self.roi_head.bbox_head)
        self.teacher_layers = tuple(dict.fromkeys((*self.hint.teacher_layers, self.teacher_layer, rpn_head)))
        self.training_layers = tuple(
            f'{head}.{loss}{kind}'
            for head in (rpn_head, self.roi_head.bbox_head)
            for loss in ('loss_cls', 'loss_bbox')
            for kind in (INPUT, KWARGS)
        )

    def prepare(self, student: nn.Module, teacher: nn.Module) -> None:
        rpn, _ = (dense_head(find_layer(model, self.rpn_head)) for model in (student, teacher))
        if not isinstance(rpn, AnchorDenseHead) or rpn.classes != 1:
            raise ConfigError(f'{self.rpn_head!r} of the student ({type(rpn.head).__name__}) is no RPN with anchors')
        self.roi_head.check(student)
        heads = (self.roi_head, student), (self.roi_head.of_teacher(teacher, self.teacher_stage), teacher)
        check_same_regions(*heads)
        check_same_predictions(*heads, 'Chen')
        for layer in (self.rpn_head, self.roi_head.bbox_head):
            if student.get_submodule(layer).reg_decoded_bbox:
                raise ConfigError(
                    f'{layer!r} of the student has reg_decoded_bbox=True; Chen compares deltas: use a loss of deltas, such as L1'
                )
        for roi_head, model in heads:
            head = model.get_submodule(roi_head.bbox_head)
            if getattr(head.loss_cls, 'use_sigmoid', False) or getattr(head, 'custom_cls_channels', False):
                raise ConfigError(
                    f'{roi_head.bbox_head!r} of {type(model).__name__} predicts no softmax over classes and background, '
                    f'which Chen compares'
                )

    def setup(self, student: Taps, teacher: Taps) -> None:
        self.teacher_roi_head = self.roi_head.of_teacher(teacher.model, self.teacher_stage)
        s, t = (
            (dense_head(taps.model.get_submodule(self.rpn_head)), taps[self.rpn_head]) for taps in (student, teacher)
        )
        check_same_slots(s, t, 'Chen')
        self.hint.setup(student, teacher)

    def forward(self, student: Taps, teacher: Taps, data_samples: list | None) -> dict[str, torch.Tensor]:
        rpn_cls, rpn_bbox = self._rpn(student, teacher)
        cls, bbox = self._rcn(student, teacher)
        hint = sum(F.mse_loss(pair.student, pair.teacher) for pair in self.hint(student, teacher))
        rpn_head, bbox_head = (student.model.get_submodule(each) for each in (self.rpn_head, self.roi_head.bbox_head))
        return {
            'loss_rpn_cls': self.rpn_cls_weight() * rpn_head.loss_cls.loss_weight * rpn_cls,
            'loss_rpn_bbox': self.rpn_bbox_weight() * rpn_head.loss_bbox.loss_weight * rpn_bbox,
            'loss_cls': self.cls_weight() * bbox_head.loss_cls.loss_weight * cls,
            'loss_bbox': self.bbox_weight() * bbox_head.loss_bbox.loss_weight * bbox,
            'loss_hint': self.hint_weight() * hint,
        }

    def _rpn(self, student: Taps, teacher: Taps) -> tuple[torch.Tensor, torch.Tensor]:
        """Class and box loss at the sampled anchors."""
        # each level's calls of the two losses: (image, row, column, anchor) in one dimension, so the teacher's alike
        classes = list(zip(*student.per_call(f'{self.rpn_head}.loss_cls{INPUT}')))
        boxes = list(zip(*student.per_call(f'{self.rpn_head}.loss_bbox{INPUT}')))
        count = student.per_call(f'{self.rpn_head}.loss_cls{KWARGS}')[0]['avg_factor']  # the same on all levels
        logits, label_weights = torch.cat(classes[0]).flatten(), torch.cat(classes[2])
        deltas, targets, box_weights = (torch.cat(each) for each in boxes[:3])
        t_logits, t_deltas = (
            torch.cat([level.permute(0, 2, 3, 1).reshape(-1, size) for level in levels])
            for levels, size in zip(teacher[self.rpn_head], (1, 4))
        )
        sampled, positive = label_weights > 0, box_weights.amax(1) > 0
        soft = weighted_divergence(
            # a sigmoid is a softmax whose background has the logit 0
            F.pad(logits[:, None], (0, 1)),
            F.pad(t_logits, (0, 1)),
            self.bg_cls_weight,
            self.tau,
        )
        bounded = bounded_error(deltas, t_deltas, targets, self.margin)
        return (soft * sampled).sum() / count, (bounded * positive).sum() / count

    def _rcn(self, student: Taps, teacher: Taps) -> tuple[torch.Tensor, torch.Tensor]:
        """Class and box loss at the sampled RoIs."""
        logits, deltas = student[self.roi_head.bbox_head]
        with torch.no_grad():
            features = self.teacher_roi_head.pool(teacher, self.teacher_layer, self.roi_head.rois(student))
            t_logits, t_deltas = self.teacher_roi_head.predict(teacher, features)
        count = max(len(logits), 1)
        soft = weighted_divergence(logits, t_logits, self.bg_cls_weight, self.tau).sum() / count
        classes, boxes = (f'{self.roi_head.bbox_head}.{loss}{INPUT}' for loss in ('loss_cls', 'loss_bbox'))
        if student.calls[boxes] == 0:  # no positive RoI
            return soft, 0 * deltas.sum()
        targets = student.per_call(boxes)[0][1]
        labels = student.per_call(classes)[0][1]
        # the positive RoIs in their order; how many there are is known, so that nothing waits for the device
        positive = (labels >= 0) & (labels < logits.shape[1] - 1)
        rows = positive.to(torch.uint8).argsort(descending=True, stable=True)[: len(targets)]
        of_class = labels[rows] if deltas.shape[1] > 4 else torch.zeros_like(rows)
        predicted, chosen = (each.view(len(each), -1, 4)[rows, of_class] for each in (deltas, t_deltas))
        return soft, bounded_error(predicted, chosen, targets, self.margin).sum() / count
