"""Decoupled features (DeFeat): objects and background apart.

Guo et al., "Distilling Object Detectors via Decoupled Features", CVPR 2021, arXiv 2103.14475.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from mmkd.distillers.base import Distiller
from mmkd.distillers.generic.kd import pixel_divergence
from mmkd.distillers.levels import LevelPairs
from mmkd.distillers.schedule import Weight
from mmkd.errors import ConfigError
from mmkd.hosts.detection.ground_truth import covered_cells, ground_truth, padded_shape
from mmkd.hosts.detection.logits import RegionLogits
from mmkd.hosts.detection.roi_pool import box_levels
from mmkd.registry import DISTILLERS
from mmkd.taps import Taps
from mmkd.values import check_temperature

ADAPTER = dict(type='ConvAdapter', kernel_size=3)


def object_masks(
    boxes: torch.Tensor, valid: torch.Tensor, sizes: Sequence[Sequence[int]], shape: Sequence[int]
) -> list[torch.Tensor]:
    """The cells of each level that objects of its size cover.

    An object belongs to one level, :func:`mmkd.hosts.detection.roi_pool.box_levels`, as a region of a RoI head does.

    Args:
        boxes: (B, K, 4), xyxy in pixels of the padded input.
        valid: (B, K), False for a box that is not there.
        sizes: H and W of each level, finest first, each half of the one before.
        shape: Height and width of the padded input.

    Returns:
        Per level (B, H, W), bool.
    """
    first = 2 ** round(math.log2(shape[1] / sizes[0][1]))
    of_box = box_levels(boxes, [first * 2**level for level in range(len(sizes))])
    return [covered_cells(boxes, valid & (of_box == level), size, shape).any(1) for level, size in enumerate(sizes)]


def decoupled_feature_losses(
    student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Half the mean square of the difference, of the objects' cells and of all others.

    .. math::
        L_\text{object} = \frac{1}{2 N} \sum_{b, i} M_{bi} \sum_c (s_{bci} - t_{bci})^2, \qquad N = C \sum_{b, i} M_{bi}

    and the same of 1 - M for the background.

    Args:
        student: (B, C, H, W), adapted.
        teacher: The same shape; no gradient flows into it.
        mask: (B, H, W), bool. Where it is empty, or its opposite is, that loss is 0.

    Returns:
        The objects' loss and the background's, scalars.
    """
    half = 0.5 * (student - teacher.detach()).square().mean(1)
    return tuple((half * cells).sum() / cells.sum().clamp(min=1) for cells in (mask, ~mask))


def decoupled_class_losses(
    student: torch.Tensor, teacher: torch.Tensor, objects: torch.Tensor, background: torch.Tensor, tau: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Divergence of the class distributions, on average over the regions of objects, and over those of background.

    .. math:: L = \frac{\tau^2}{n} \sum_r m_r \operatorname{KL}(p^T_r \,\|\, p^S_r), \qquad
        p = \operatorname{softmax}(z / \tau), \quad n = \sum_r m_r

    Args:
        student: (n, K) logits.
        teacher: The same shape; no gradient flows into it.
        objects: (n,), bool, which regions are of objects.
        background: (n,), bool, which are of background.
        tau: Temperature.

    Returns:
        The objects' loss and the background's, scalars; 0 where there is none.
    """
    return tuple(pixel_divergence(student, teacher, tau, valid=regions[:, None]) for regions in (objects, background))


@DISTILLERS.register_module()
class DeFeat(Distiller):
    """Decoupled features: objects and background are compared apart, in features and in classes.

    =================== ==========================================================================================
    loss_object         :func:`decoupled_feature_losses` within the :func:`object_masks`, mean over levels
    loss_background     the same outside of them
    loss_cls_object     :func:`decoupled_class_losses` of the student's RoIs that it takes for objects
    loss_cls_background the same of the others
    =================== ==========================================================================================

    The RoIs are those that the student's own sampler drew, over which the teacher's RoI head is run as well. One-stage students
    set both ``cls_`` weights to 0, and have the features alone.

    Origin of the defaults, and differences from paper and code: ``docs/methods/defeat.md``.

    Args:
        layer: The student's layer, or a list; a pyramid, finest level first. Default ``'neck'``.
        object_weight: Weight of ``loss_object``, a number or a schedule, as all weights. Default 4.
        background_weight: Weight of ``loss_background``. Default 16.
        cls_object_weight: Weight of ``loss_cls_object``. Default 2.
        cls_background_weight: Weight of ``loss_cls_background``. Default 2.
        tau: Temperature of the classes, positive. Default 1.
        adapter: A dict; ``'auto'`` (1x1 convolution exactly where channels differ) or None. By default a 3x3 convolution
            for each level, for equal channels too.
        teacher_layer: The teacher's layer, where its name differs.

    Example:
        >>> distillers = dict(defeat=dict(type='DeFeat'))                                                # Faster R-CNN
        >>> distillers = dict(defeat=dict(type='DeFeat', cls_object_weight=0, cls_background_weight=0))  # RetinaNet
    """

    any_scale = maps_classes = True

    def __init__(
        self,
        layer: str | Sequence[str] = 'neck',
        object_weight: float | Mapping = 4.0,
        background_weight: float | Mapping = 16.0,
        cls_object_weight: float | Mapping = 2.0,
        cls_background_weight: float | Mapping = 2.0,
        tau: float = 1.0,
        adapter: str | Mapping | None = ADAPTER,
        teacher_layer: str | Sequence[str] | None = None,
    ):
        super().__init__()
        check_temperature(tau)
        self.tau = tau
        self.levels = LevelPairs(layer, teacher_layer, adapter)
        self.student_layers, self.teacher_layers = self.levels.student_layers, self.levels.teacher_layers
        self.compares_classes = bool(cls_object_weight) or bool(cls_background_weight)
        if self.compares_classes:
            self.regions = RegionLogits('roi_head', method='DeFeat')
            self.student_layers += self.regions.student_layers
            self.teacher_layers += self.regions.teacher_layers
            self.training_layers = self.regions.label_layers
        self.object_weight = Weight(object_weight, 'object_weight')
        self.background_weight = Weight(background_weight, 'background_weight')
        self.cls_object_weight = Weight(cls_object_weight, 'cls_object_weight')
        self.cls_background_weight = Weight(cls_background_weight, 'cls_background_weight')

    def prepare(self, student: nn.Module, teacher: nn.Module) -> None:
        if not self.compares_classes:
            return
        for model, whose in ((student, 'student'), (teacher, 'teacher')):
            if not hasattr(model, 'roi_head'):
                raise ConfigError(
                    f'cls_object_weight, cls_background_weight: the {whose} ({type(model).__name__}) has no roi_head, whose '
                    f'classes are compared; set both to 0'
                )
        self.regions.prepare(student, teacher)

    def setup(self, student: Taps, teacher: Taps) -> None:
        self.levels.setup(student, teacher)
        if self.compares_classes:
            self.regions.setup(student, teacher)

    def masks(self, levels: Sequence[torch.Tensor], data_samples: list) -> list[torch.Tensor]:
        """The :func:`object_masks` of maps."""
        return object_masks(
            *ground_truth(data_samples), [each.shape[2:] for each in levels], padded_shape(data_samples)
        )

    def pictures(self, student: Taps, teacher: Taps, data_samples: list | None) -> dict[str, torch.Tensor]:
        pairs = self.levels(student, teacher)
        masks = self.masks([pair.student for pair in pairs], data_samples)
        return {f'objects, level {pair.student_level}': mask for pair, mask in zip(pairs, masks)}

    def forward(self, student: Taps, teacher: Taps, data_samples: list | None) -> dict[str, torch.Tensor]:
        pairs = self.levels(student, teacher)
        masks = self.masks([pair.student for pair in pairs], data_samples)
        levels = [decoupled_feature_losses(pair.student, pair.teacher, mask) for pair, mask in zip(pairs, masks)]
        objects, background = (sum(each) / len(levels) for each in zip(*levels))
        losses = {
            'loss_object': self.object_weight() * objects,
            'loss_background': self.background_weight() * background,
        }
        if self.compares_classes:
            objects, background = self._of_classes(student, teacher, data_samples)
            losses['loss_cls_object'] = self.cls_object_weight() * objects
            losses['loss_cls_background'] = self.cls_background_weight() * background
        return losses

    def _of_classes(self, student: Taps, teacher: Taps, data_samples: list | None) -> tuple[torch.Tensor, torch.Tensor]:
        (logits,) = self.regions(student, teacher, data_samples)
        labels = self.regions.labels(logits, student, data_samples)
        background = labels == student.model.get_submodule(self.regions.roi_head.bbox_head).num_classes
        objects = (logits.positions_of(labels) >= 0) & ~background  # of classes that the teacher knows
        return decoupled_class_losses(logits.student, logits.teacher, objects, background, self.tau)
