"""Cross-head distillation (CrossKD).

Wang et al., "CrossKD: Cross-Head Knowledge Distillation for Object Detection", CVPR 2024, arXiv 2306.11369.
"""

from collections.abc import Mapping, Sequence

import torch
from mmdet.utils import reduce_mean
from torch import nn

from mmkd.adapters import Adapters
from mmkd.distillers.base import Distiller
from mmkd.distillers.detection.bckd import binary_class_loss, box_loss, mean_positives, positives
from mmkd.distillers.detection.ld import distribution_divergence
from mmkd.distillers.generic.pkd import standardize
from mmkd.distillers.levels import require_gradient
from mmkd.distillers.schedule import Weight
from mmkd.errors import ConfigError
from mmkd.hosts.activations import before_activation
from mmkd.hosts.detection.dense_heads import TOWERS, DistributionDenseHead, check_towers, dense_head, predict_from
from mmkd.registry import DISTILLERS
from mmkd.taps import INPUT, Taps, find_layer
from mmkd.values import is_whole


def aligned(student: torch.Tensor, teacher: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    r"""The student's feature with the mean and standard deviation of each of the teacher's channels.

    .. math:: \hat s_{bci} = \sigma^T_c \frac{s_{bci} - \mu^S_c}{\sigma^S_c + \epsilon} + \mu^T_c

    over all images and positions, see :func:`mmkd.distillers.generic.pkd.standardize`. Equal inputs stay, up to eps.

    Args:
        student: (B, C, H, W).
        teacher: The same shape; no gradient flows into it.
        eps: Added to the student's standard deviation.

    Returns:
        The same shape.
    """
    unbiased = int(teacher.numel() > teacher.shape[1])
    deviation, mean = torch.std_mean(teacher.detach(), dim=(0, 2, 3), correction=unbiased, keepdim=True)
    return standardize(student, eps) * deviation + mean


@DISTILLERS.register_module()
class CrossKD(Distiller):
    """The student's features go through the rest of the teacher's head, whose predictions are compared.

    What the student's head has after ``position`` convolutions, before the activation, is :func:`aligned` with the
    teacher's and goes on through the teacher's convolutions and predictors. The student's own predictions learn from the ground
    truth alone.

    - ``loss_cls``: :func:`mmkd.distillers.detection.bckd.binary_class_loss` of these class logits and the teacher's, divided
      by the number of slots that the student's own assigner makes positive.
    - ``loss_bbox``: of a GFL head the divergence of the distributions of each side, summed over bins; else 1 - GIoU of the
      boxes. Mean over slots, weighted with the teacher's highest class probability.

    Slots in the padding do not count. As both sides are said by the teacher's head, the student's may be of another kind, other
    anchors and other classes. Defaults are those for RetinaNet and ATSS; the others': ``docs/methods/crosskd.md``.

    Args:
        head: The dense head, ``'bbox_head'``.
        position: The number of convolutions, of each tower, that are the student's own. 0: the student's neck is read. Default
            3; 2 for FCOS.
        cls_weight: Weight of ``loss_cls``, a number or a schedule. Default 1; 0.4 for FCOS.
        bbox_weight: Weight of ``loss_bbox``, a number or a schedule. Default 1; 4 for GFL, 0.75 for FCOS.
        adapter: ``'auto'`` (1x1 convolution exactly where channels differ), None or a dict; one for each tower.
        teacher_head: The teacher's head, where its name differs.

    Raises:
        ConfigError: for heads without such towers, of other strides, or a teacher that is trained along.

    Example:
        >>> distillers = dict(crosskd=dict(type='CrossKD'))
        >>> distillers = dict(crosskd=dict(type='CrossKD', bbox_weight=4.0))    # GFL
    """

    maps_classes = True  # all classes are the teacher's

    def __init__(
        self,
        head: str = 'bbox_head',
        position: int = 3,
        cls_weight: float | Mapping = 1.0,
        bbox_weight: float | Mapping = 1.0,
        adapter: str | Mapping | None = 'auto',
        teacher_head: str | None = None,
    ):
        super().__init__()
        if not (is_whole(position) and position >= 0):
            raise ConfigError(f'position={position!r}: expected a whole number of convolutions, at least 0')
        self.head, self.teacher_head, self.position = head, teacher_head or head, position
        self.cls_weight, self.bbox_weight = Weight(cls_weight, 'cls_weight'), Weight(bbox_weight, 'bbox_weight')
        self.adapter = adapter
        self.student_layers, self.teacher_layers = (self.head,), (self.teacher_head,)

    def _tower(self, model: nn.Module, head: str, tower: str) -> str:
        if self.position == 0:
            return f'{head}.{tower}.0{INPUT}'
        return before_activation(model, f'{head}.{tower}.{self.position - 1}')

    def prepare(self, student: nn.Module, teacher: nn.Module) -> None:
        for model, name in ((student, self.head), (teacher, self.teacher_head)):
            dense_head(find_layer(model, name))
            check_towers(find_layer(model, name), name, max(self.position, 1))
        dense_head(find_layer(student, self.head)).check_assigner()
        if any(each.requires_grad for each in find_layer(teacher, self.teacher_head).parameters()):
            raise ConfigError(
                f'CrossKD sends the student through {self.teacher_head!r} of its teacher, which must not learn from that; use a '
                f'frozen teacher or an average'
            )
        self.student_layers, self.teacher_layers = (
            (name, *(self._tower(model, name, tower) for tower in TOWERS))
            for model, name in ((student, self.head), (teacher, self.teacher_head))
        )

    def setup(self, student: Taps, teacher: Taps) -> None:
        features, targets = self._features(student, self.student_layers), self._features(teacher, self.teacher_layers)
        sizes = [[tuple(each.shape[2:]) for each in levels] for levels in (features[0], targets[0])]
        if sizes[0] != sizes[1]:
            raise ConfigError(
                f'the heads have levels of sizes {sizes[0]} (student) and {sizes[1]} (teacher) for one image; CrossKD needs the '
                f'same strides'
            )
        names = (self.head, self.teacher_head)
        self.adapters = nn.ModuleList(
            Adapters(self.adapter, own[:1], others[:1], names) for own, others in zip(features, targets, strict=True)
        )

    @staticmethod
    def _features(taps: Taps, layers: Sequence[str]) -> list[tuple]:
        """Of each tower, and each level, what it has after ``position`` convolutions and their norm, before the activation."""
        return [taps.per_call(layer) for layer in layers[1:]]

    def cross(self, student: Taps, teacher: Taps) -> tuple:
        """What the teacher's head puts out for the student's features."""
        head, features = teacher.model.get_submodule(self.teacher_head), {}
        towers = self._features(student, self.student_layers), self._features(teacher, self.teacher_layers)
        for tower, adapt, own, others in zip(TOWERS, self.adapters, *towers, strict=True):
            require_gradient(self.head, own)
            pairs = [(*adapt([s], [t]), t) for s, t in zip(own, others, strict=True)]
            features[tower] = [self._activate(head, tower, aligned(s, t)) for s, t in pairs]
        return predict_from(head, self.position, features)

    def _activate(self, head: nn.Module, tower: str, feature: torch.Tensor) -> torch.Tensor:
        if self.position == 0:
            return feature
        convolution = getattr(head, tower)[self.position - 1]
        return convolution.activate(feature) if convolution.with_activation else feature

    def forward(self, student: Taps, teacher: Taps, data_samples: list | None) -> dict[str, torch.Tensor]:
        t = dense_head(teacher.model.get_submodule(self.teacher_head))
        crossed, other = self.cross(student, teacher), teacher[self.teacher_head]
        counted = t.in_image(other, [sample.metainfo for sample in data_samples])
        s = dense_head(student.model.get_submodule(self.head))
        number = mean_positives(positives(s, student[self.head], data_samples))
        logits = t.slot_logits(other)
        weights = logits.sigmoid().amax(2) * counted
        if isinstance(t, DistributionDenseHead):
            sides = distribution_divergence(t.distributions(crossed), t.distributions(other), 1.0, 'sum')
            boxes = (sides.mean(2) * weights).sum()
        else:
            priors = t.priors(other)
            boxes = box_loss(*(t.decode(priors, t.regression(each)) for each in (crossed, other)), weights)
        return {
            'loss_cls': self.cls_weight() * binary_class_loss(t.slot_logits(crossed), logits, counted) / number,
            'loss_bbox': self.bbox_weight() * boxes / reduce_mean(weights.sum()).clamp(min=1e-6),
        }
