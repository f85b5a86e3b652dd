"""Knowledge distillation of two-stage detectors: classes, boxes and a hint.

Chen, Choi, Yu, Han, Chandraker, "Learning Efficient Object Detection Models with Knowledge Distillation", NeurIPS 2017.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F

from mmkd.distillers.base import Distiller
from mmkd.distillers.levels import LevelPairs
from mmkd.distillers.schedule import Weight
from mmkd.errors import ConfigError
from mmkd.hosts.detection.dense_heads import AnchorDenseHead, check_same_slots, dense_head
from mmkd.hosts.detection.rois import RoIHead
from mmkd.registry import DISTILLERS
from mmkd.taps import INPUT, Taps, find_layer

ADAPTER = dict(type='ConvAdapter')


def weighted_divergence(
    student: torch.Tensor, teacher: torch.Tensor, background_weight: float = 1.5, temperature: float = 1.0
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
        background_weight: 1 gives the Kullback-Leibler divergence.
        temperature: Divides both networks' logits.

    Returns:
        One value for each row, (...).
    """
    student = F.log_softmax(student / temperature, -1)
    teacher = F.log_softmax(teacher.detach() / temperature, -1)
    divergence = teacher.exp() * (teacher - student)
    return divergence.sum(-1) + (background_weight - 1) * divergence[..., -1]


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
        margin: m.

    Returns:
        One value for each row, (...).
    """
    error = (student - target).square().sum(-1)
    bound = (teacher.detach() - target).square().sum(-1)
    return error * (error.detach() + margin > bound)


@DISTILLERS.register_module()
class Chen(Distiller):
    r"""The first distillation of two-stage detectors: soft classes, bounded boxes and a hint.

    .. math::
        L = L_{RPN} + \lambda L_{RCN} + \gamma L_{hint}, \qquad
        L_{RPN}, L_{RCN} = \mu L_{hard} + (1 - \mu) L_{soft} + L_{smooth} + \nu L_b

    - **RPN** (``loss_rpn_class``, ``loss_rpn_box``): at the anchors that the student's own loss sampled, its objectness as
      two classes, object and background.
    - **RCN** (``loss_class``, ``loss_box``): at the RoIs that the student's own sampler drew, for which the teacher is run as
      well; boxes at the positive ones, those of the assigned class.
    - **Hint** (``loss_hint``): the necks (or ``hint_layer``), whose difference is squared and averaged over the elements of each
      level (the paper writes the squared norm); levels are added. The adapter is always there, for equal channels too.

    The soft loss is :func:`weighted_divergence`, L_b is :func:`bounded_error` of deltas; both are divided by the number of
    sampled anchors or RoIs, as mmdet divides its own losses. The paper's smooth L1 is the student's own box loss, whatever
    its config has there.

    **What** :math:`\mu` **means here.** The hard losses stay as the student computes them; this adds
    :math:`(1 - \mu) / \mu \cdot L_{soft}`, times the ``loss_weight`` of the student's own class loss. So both are in the
    paper's proportion, and their sum is :math:`1 / \mu` times the paper's. With ``loss_cls=dict(loss_weight=mu)``
    in the student's RPN and box head the sum is the paper's exactly. L_b is, alike, times the ``loss_weight`` of
    the student's box loss. :math:`\lambda` multiplies what is added here alone.

    Sources: :math:`\lambda`, :math:`\gamma`, the weight of the background and the temperature are the paper's, by a reading
    note; 0.5 for ``mu`` and ``nu`` is from memory, unverified; the paper's margin is not known (0 is common). There is no
    code of the authors.

    Args:
        neck: The layer that RoIs are pooled from.
        rpn_head: The RPN.
        roi_head: The RoI head.
        stage: The stage, where ``roi_head`` is a cascade.
        mu: Share of the hard class losses, 0 < mu <= 1. Default 0.5.
        nu: Weight of the bounded box losses, a number or a schedule, as all weights. Default 0.5.
        margin: The teacher bounds the student until it is better by this much, in squared deltas. Default 0.
        background_weight: In the soft losses. Default 1.5.
        temperature: Of the soft losses. Default 1.
        rcn_weight: :math:`\lambda`. Default 1.
        hint_weight: :math:`\gamma`. Default 0.5.
        hint_layer: The layer of the hint, or a list. Default: the neck.
        adapter: A dict; ``'auto'`` (1x1 convolution exactly where channels differ) or None.
        teacher_neck: The teacher's layer, where its name differs.
        teacher_hint_layer: Alike.

    Example:
        >>> distillers = dict(chen=dict(type='Chen', mu=0.8))
    """

    def __init__(
        self,
        neck: str = 'neck',
        rpn_head: str = 'rpn_head',
        roi_head: str = 'roi_head',
        stage: int | None = None,
        mu: float = 0.5,
        nu: float | Mapping = 0.5,
        margin: float = 0.0,
        background_weight: float = 1.5,
        temperature: float = 1.0,
        rcn_weight: float | Mapping = 1.0,
        hint_weight: float | Mapping = 0.5,
        hint_layer: str | Sequence[str] | None = None,
        adapter: str | Mapping | None = ADAPTER,
        teacher_neck: str | None = None,
        teacher_hint_layer: str | Sequence[str] | None = None,
    ):
        super().__init__()
        if not (isinstance(mu, (int, float)) and 0 < mu <= 1):
            raise ConfigError(f'mu={mu!r}: expected a number, 0 < mu <= 1; for soft losses alone set loss_weight=0')
        for name, value in (('background_weight', background_weight), ('temperature', temperature)):
            if not isinstance(value, (int, float)) or value <= 0:
                raise ConfigError(f'{name}={value!r}: expected a positive number')
        if not isinstance(margin, (int, float)) or margin < 0:
            raise ConfigError(f'margin={margin!r}: expected a number of at least 0')
        self.teacher_neck = teacher_neck or neck
        other = teacher_hint_layer or hint_layer or self.teacher_neck
        self.hint = LevelPairs(hint_layer or neck, other, adapter)
        self.hint_weight = Weight(hint_weight)
        self.rpn_head, self.roi_head = rpn_head, RoIHead(roi_head, stage)
        self.mu, self.nu, self.margin = mu, Weight(nu), margin
        self.background_weight, self.temperature = background_weight, temperature
        self.rcn_weight = Weight(rcn_weight)
        self.student_layers = (
            *self.hint.student_layers,
            rpn_head,
            *self.roi_head.layers,
            self.roi_head.bbox_head,
        )
        self.teacher_layers = tuple(dict.fromkeys((*self.hint.teacher_layers, self.teacher_neck, rpn_head)))
        self.training_layers = tuple(
            f'{head}.{loss}{INPUT}'
            for head in (rpn_head, self.roi_head.bbox_head)
            for loss in ('loss_cls', 'loss_bbox')
        )

    def setup(self, student: Taps, teacher: Taps) -> None:
        self.roi_head.check(student, teacher)
        self.roi_head.check_predictions(student, teacher, 'Chen')
        s, t = (dense_head(find_layer(taps.model, self.rpn_head)) for taps in (student, teacher))
        if not isinstance(s, AnchorDenseHead) or s.classes != 1:
            raise ConfigError(f'{self.rpn_head!r} of the student ({type(s.head).__name__}) is no RPN with anchors')
        check_same_slots((s, student[self.rpn_head]), (t, teacher[self.rpn_head]), 'Chen')
        for layer in (self.rpn_head, self.roi_head.bbox_head):
            head = student.model.get_submodule(layer)
            if head.reg_decoded_bbox:
                raise ConfigError(
                    f'{layer!r} of the student has reg_decoded_bbox=True; Chen compares deltas: use a loss of deltas, such as L1'
                )
        for taps in (student, teacher):
            head = taps.model.get_submodule(self.roi_head.bbox_head)
            if getattr(head.loss_cls, 'use_sigmoid', False) or getattr(head, 'custom_cls_channels', False):
                raise ConfigError(
                    f'{self.roi_head.bbox_head!r} of {type(taps.model).__name__} predicts no softmax over classes and '
                    f'background, which Chen compares'
                )
        self.hint.setup(student, teacher)

    def forward(self, student: Taps, teacher: Taps, data_samples: list | None) -> dict[str, torch.Tensor]:
        rpn_class, rpn_box = self._rpn(student, teacher)
        rcn_class, rcn_box = self._rcn(student, teacher)
        hint = sum(F.mse_loss(pair.student, pair.teacher) for pair in self.hint(student, teacher))
        soft, nu, rcn = (1 - self.mu) / self.mu, self.nu(), self.rcn_weight()
        rpn_head, bbox_head = (student.model.get_submodule(each) for each in (self.rpn_head, self.roi_head.bbox_head))
        return {
            'loss_rpn_class': soft * rpn_head.loss_cls.loss_weight * rpn_class,
            'loss_rpn_box': nu * rpn_head.loss_bbox.loss_weight * rpn_box,
            'loss_class': rcn * soft * bbox_head.loss_cls.loss_weight * rcn_class,
            'loss_box': rcn * nu * bbox_head.loss_bbox.loss_weight * rcn_box,
            'loss_hint': self.hint_weight() * hint,
        }

    def _rpn(self, student: Taps, teacher: Taps) -> tuple[torch.Tensor, torch.Tensor]:
        """Class and box loss at the sampled anchors."""
        # each level's calls of the two losses: (image, row, column, anchor) in one dimension, so the teacher's alike
        classes = list(zip(*student.per_call(f'{self.rpn_head}.loss_cls{INPUT}')))
        boxes = list(zip(*student.per_call(f'{self.rpn_head}.loss_bbox{INPUT}')))
        logits, label_weights = torch.cat(classes[0]).flatten(), torch.cat(classes[2])
        deltas, targets, box_weights = (torch.cat(each) for each in boxes[:3])
        t_logits, t_deltas = (
            torch.cat([level.permute(0, 2, 3, 1).reshape(-1, size) for level in levels])
            for levels, size in zip(teacher[self.rpn_head], (1, 4))
        )
        sampled, positive = label_weights > 0, box_weights.amax(1) > 0
        count = sampled.sum().clamp(min=1)
        soft = weighted_divergence(
            # a sigmoid is a softmax whose background has the logit 0
            F.pad(logits[:, None], (0, 1)),
            F.pad(t_logits, (0, 1)),
            self.background_weight,
            self.temperature,
        )
        bounded = bounded_error(deltas, t_deltas, targets, self.margin)
        return (soft * sampled).sum() / count, (bounded * positive).sum() / count

    def _rcn(self, student: Taps, teacher: Taps) -> tuple[torch.Tensor, torch.Tensor]:
        """Class and box loss at the sampled RoIs."""
        logits, deltas = student[self.roi_head.bbox_head]
        features = self.roi_head.pool_teacher(teacher, self.teacher_neck, self.roi_head.rois(student))
        t_logits, t_deltas = self.roi_head.predict_teacher(teacher, features)
        count = max(len(logits), 1)
        soft = weighted_divergence(logits, t_logits, self.background_weight, self.temperature).sum() / count
        classes, boxes = (f'{self.roi_head.bbox_head}.{loss}{INPUT}' for loss in ('loss_cls', 'loss_bbox'))
        if student.calls[boxes] == 0:  # no positive RoI
            return soft, 0 * deltas.sum()
        predicted, targets = student.per_call(boxes)[0][:2]
        labels = student.per_call(classes)[0][1]
        chosen = t_deltas.view(len(t_deltas), -1, 4)
        # the positive RoIs in their order; how many there are is known, so that nothing waits for the device
        positive = (labels >= 0) & (labels < logits.shape[1] - 1)
        rows = positive.to(torch.uint8).argsort(descending=True, stable=True)[: len(targets)]
        chosen = chosen[rows, labels[rows] if chosen.shape[1] > 1 else torch.zeros_like(rows)]
        return soft, bounded_error(predicted, chosen, targets, self.margin).sum() / count
