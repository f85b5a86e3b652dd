"""Feature richness (FRS).

Du et al., "Distilling Object Detectors with Feature Richness", NeurIPS 2021, arXiv 2111.00674.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from mmkd.distillers.base import Distiller
from mmkd.distillers.levels import LevelPairs
from mmkd.distillers.schedule import Weight
from mmkd.errors import ConfigError
from mmkd.hosts.detection.dense_heads import check_same_slots, dense_head
from mmkd.registry import DISTILLERS
from mmkd.taps import Taps, find_layer

FEATURE_WEIGHT = dict(type='linear', value=0.005, end=500)
CLS_WEIGHT = dict(type='linear', value=0.02, end=500)
ADAPTER = dict(type='ConvAdapter', kernel_size=3)


@torch.no_grad()
def richness(logits: torch.Tensor) -> torch.Tensor:
    r"""How sure the teacher is that there is an object, of whatever class.

    .. math:: M_{bij} = \max_{a, c} \sigma(z^T_{bacij})

    Args:
        logits: (B, A, C, H, W), the teacher's class logits of one level.

    Returns:
        (B, H, W), in (0, 1).
    """
    return logits.amax((1, 2)).sigmoid()


def rich_feature_loss(student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    r"""Squared difference of the features, summed over channels, mean over locations weighted with the mask.

    .. math:: L = \frac{\sum_{b, i, j} M_{bij} \sum_c (t_{bcij} - s_{bcij})^2}{\sum_{b, i, j} M_{bij}}

    Args:
        student: (B, C, H, W), adapted.
        teacher: The same shape; no gradient flows into it.
        mask: (B, H, W), not negative.

    Returns:
        A scalar.
    """
    squared = (teacher.detach() - student).square().sum(1)
    return (squared * mask).sum() / mask.sum().clamp(min=1e-12)


def rich_class_loss(student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    r"""Binary cross-entropy with the teacher's probabilities, less their entropy; summed and averaged as the features.

    .. math::
        L = \frac{\sum_{b, i, j} M_{bij} \sum_{a, c} \operatorname{KL}(\sigma(z^T_{bacij}) \,\|\, \sigma(z^S_{bacij}))}
            {\sum_{b, i, j} M_{bij}}

    The paper has the cross-entropy itself; the gradient is the same, and this is 0 where the networks agree.

    Args:
        student: (B, A, C, H, W), class logits.
        teacher: The same shape; no gradient flows into it.
        mask: (B, H, W), not negative.

    Returns:
        A scalar.
    """
    teacher = teacher.detach()
    target = teacher.sigmoid()
    cross_entropy = F.binary_cross_entropy_with_logits(student, target, reduction='none')
    entropy = F.binary_cross_entropy_with_logits(teacher, target, reduction='none')
    divergence = (cross_entropy - entropy).sum((1, 2))
    return (divergence * mask).sum() / mask.sum().clamp(min=1e-12)


@DISTILLERS.register_module()
class FRS(Distiller):
    """Feature richness: the student learns features and classes where the teacher sees an object of any class.

    On each level the teacher's highest class probability is the mask, :func:`richness`; no ground truth is needed. Both
    losses are added over levels:

    - ``loss_feature``: :func:`rich_feature_loss` of ``layer``, the student's after a 3x3 convolution.
    - ``loss_cls``: :func:`rich_class_loss` of the class logits of both heads; of a two-stage detector's RPN the objectness.

    By default both weights rise linearly from 0 over the first 500 iterations. The defaults are those of the authors'
    config for RetinaNet; theirs for FCOS, GFL and Faster R-CNN are in ``docs/methods/frs.md``.

    Args:
        layer: The layer whose levels are compared, the one that the head reads.
        head: The dense head, ``'bbox_head'`` (default) or, of a two-stage detector, ``'rpn_head'``.
        feature_weight: Weight of ``loss_feature``, a schedule or a number, which has no warm-up. Default
            ``dict(type='linear', value=0.005, end=500)``.
        cls_weight: Weight of ``loss_cls``, a schedule or a number. Default ``dict(type='linear', value=0.02, end=500)``. With
            0 the student's head is not read, so that it may differ from the teacher's.
        adapter: A dict; ``'auto'`` (1x1 convolution exactly where channels differ) or None. By default a 3x3 convolution
            for each level, for equal channels too.
        teacher_layer: The teacher's layer, where its name differs.
        teacher_head: The teacher's head, where its name differs.

    Example:
        >>> distillers = dict(frs=dict(type='FRS'))                     # RetinaNet
        >>> distillers = dict(frs=dict(type='FRS', head='rpn_head'))    # Faster R-CNN, with its weights
    """

    renamed = {'neck': 'layer', 'teacher_neck': 'teacher_layer', 'class_weight': 'cls_weight'}

    def __init__(
        self,
        layer: str = 'neck',
        head: str = 'bbox_head',
        feature_weight: float | Mapping = FEATURE_WEIGHT,
        cls_weight: float | Mapping = CLS_WEIGHT,
        adapter: str | Mapping | None = ADAPTER,
        teacher_layer: str | None = None,
        teacher_head: str | None = None,
    ):
        super().__init__()
        self.features = LevelPairs(layer, teacher_layer, adapter)
        self.feature_weight = Weight(feature_weight, 'feature_weight')
        self.layer, self.head = layer, head
        self.teacher_layer, self.teacher_head = teacher_layer or layer, teacher_head or head
        self.compares_classes = bool(cls_weight)
        self.cls_weight = Weight(cls_weight, 'cls_weight')
        self.student_layers = (layer, head) if self.compares_classes else (layer,)
        self.teacher_layers = (self.teacher_layer, self.teacher_head)

    def prepare(self, student: nn.Module, teacher: nn.Module) -> None:
        dense_head(find_layer(teacher, self.teacher_head))
        if self.compares_classes:
            dense_head(find_layer(student, self.head))

    def setup(self, student: Taps, teacher: Taps) -> None:
        t_head = dense_head(teacher.model.get_submodule(self.teacher_head))
        logits = t_head.class_logits(teacher[self.teacher_head])
        self.features.setup(student, teacher)
        sizes = [[tuple(each.shape[-2:]) for each in levels] for levels in (teacher[self.teacher_layer], logits)]
        if sizes[0] != sizes[1]:
            raise ConfigError(
                f'the levels of the teacher have sizes {sizes[0]} in {self.teacher_layer!r} and {sizes[1]} in '
                f'{self.teacher_head!r}; name the layer that the head reads'
            )
        if self.compares_classes:
            s_head = dense_head(student.model.get_submodule(self.head))
            heads = (s_head, student[self.head]), (t_head, teacher[self.teacher_head])
            check_same_slots(*heads, 'FRS (unless cls_weight=0)', boxes=False)

    def pictures(self, student: Taps, teacher: Taps, data_samples: list | None) -> dict[str, torch.Tensor]:
        t_head = dense_head(teacher.model.get_submodule(self.teacher_head))
        levels = t_head.class_logits(teacher[self.teacher_head])
        return {f'richness, level {level}': richness(each) for level, each in enumerate(levels)}

    def forward(self, student: Taps, teacher: Taps, data_samples: list | None) -> dict[str, torch.Tensor]:
        t_head = dense_head(teacher.model.get_submodule(self.teacher_head))
        targets = t_head.class_logits(teacher[self.teacher_head])
        masks = [richness(level) for level in targets]
        pairs = self.features(student, teacher)
        feature = sum(rich_feature_loss(pair.student, pair.teacher, masks[pair.teacher_level]) for pair in pairs)
        losses = {'loss_feature': self.feature_weight() * feature}
        if self.compares_classes:
            logits = dense_head(student.model.get_submodule(self.head)).class_logits(student[self.head])
            classes = sum(rich_class_loss(s, t, mask) for s, t, mask in zip(logits, targets, masks, strict=True))
            losses['loss_cls'] = self.cls_weight() * classes
        return losses
