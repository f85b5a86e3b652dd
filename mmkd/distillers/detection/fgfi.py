"""Fine-grained feature imitation (FGFI).

Wang, Yuan, Zhang, Feng, "Distilling Object Detectors with Fine-grained Feature Imitation", CVPR 2019, arXiv 1906.03609.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from mmkd.distillers.base import FeatureDistiller
from mmkd.errors import ConfigError
from mmkd.hosts.detection.dense_heads import AnchorDenseHead, check_levels, dense_head
from mmkd.hosts.detection.ground_truth import ground_truth
from mmkd.registry import DISTILLERS
from mmkd.taps import Taps, find_layer
from mmkd.values import is_number

WEIGHT = dict(type='constant', value=0.01, begin=400)
ADAPTER = dict(type='ConvAdapter', kernel_size=3, relu=True, init_std=1e-4)


def grid_iou(boxes: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
    """Intersection over union of each box with each anchor of a regular grid.

    The overlap of a box and an anchor is a product of one along x, the same in all rows, and one along y, the same in all
    columns. So few tensors of the result's size are made.

    Args:
        boxes: (B, K, 4), xyxy in pixels.
        anchors: (H, W, A, 4), xyxy in pixels: A anchors, moved by a stride per row and column.

    Returns:
        (B, K, H, W, A).
    """
    columns, rows = anchors[0, :, :, 0::2], anchors[:, 0, :, 1::2]  # (W, A, 2), (H, A, 2)
    boxes = boxes[:, :, None, None]

    def along(first: torch.Tensor, last: torch.Tensor, sides: torch.Tensor) -> torch.Tensor:
        return (torch.minimum(last, sides[..., 1]) - torch.maximum(first, sides[..., 0])).clamp(min=0)

    x, y = along(boxes[..., 0], boxes[..., 2], columns), along(boxes[..., 1], boxes[..., 3], rows)
    overlap = y[:, :, :, None] * x[:, :, None]
    areas = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
    anchor_areas = (anchors[..., 2] - anchors[..., 0]) * (anchors[..., 3] - anchors[..., 1])
    return overlap / (areas[..., None] + anchor_areas - overlap).clamp(min=1e-6)


@torch.no_grad()
def imitation_masks(
    anchors: Sequence[torch.Tensor], boxes: torch.Tensor, valid: torch.Tensor, psi: float = 0.5, levels: str = 'best'
) -> list[torch.Tensor]:
    r"""The locations near objects, where an anchor overlaps one nearly as much as any anchor does.

    .. math::
        I_{ij} = 1 \iff \exists\, g, a: \operatorname{IoU}(g, \text{anchor}_{ija}) > \psi \max_{i'j'a'}
        \operatorname{IoU}(g, \text{anchor}_{i'j'a'})

    Args:
        anchors: Per level (H, W, A, 4), xyxy in pixels of the padded input.
        boxes: (B, K, 4), the ground truth, in the same unit.
        valid: (B, K), False for an object that is not there.
        psi: Fraction of the largest IoU, in [0, 1).
        levels: ``'best'``: an object marks locations of one level, the one with the anchor that overlaps it most (the finest
            of several). ``'all'``: it marks locations of each level, relative to the largest IoU there.

    Returns:
        Per level (B, H, W), bool.
    """
    overlaps = [grid_iou(boxes, each) for each in anchors]
    largest = torch.stack([each.amax((2, 3, 4)) for each in overlaps])  # (levels, B, K)
    if levels == 'all':
        marks = valid.expand_as(largest)
    else:
        best = largest == largest.amax(0)
        marks = best & (best.cumsum(0) == 1) & valid
    masks = []
    for overlap, maximum, marked in zip(overlaps, largest, marks):
        above = overlap.amax(4) > psi * maximum[..., None, None]
        masks.append((above & marked[..., None, None]).any(1))
    return masks


def imitation_loss(student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    r"""Half the squared difference of the features in the mask, summed over channels, mean over its locations.

    .. math:: L = \frac{1}{2 N_p} \sum_{b, i, j} I_{bij} \sum_c (s_{bcij} - t_{bcij})^2, \qquad N_p = \sum_{b, i, j} I_{bij}

    Args:
        student: (B, C, H, W), adapted.
        teacher: The same shape; no gradient flows into it.
        mask: (B, H, W), bool; for an empty one the loss is 0.

    Returns:
        A scalar.
    """
    squared = (student - teacher.detach()).square().sum(1)
    return (squared * mask).sum() / (2 * mask.sum().clamp(min=1))


@DISTILLERS.register_module()
class FGFI(FeatureDistiller):
    """Fine-grained feature imitation: the student's features equal the teacher's near objects.

    Near an object is where an anchor of the student's head overlaps it by more than ``psi`` times the largest IoU of that
    object with any anchor, see :func:`imitation_masks`. ``loss`` is :func:`imitation_loss` within these masks,
    added over levels. Heads without anchors are refused.

    The student's features pass a 3x3 convolution and a ReLU first, for equal channels too. After a ReLU no feature is
    negative, while those of an FPN may be: ``adapter=dict(type='ConvAdapter', kernel_size=3)`` has none.

    Origin of the defaults, differences from the authors' code, and which heads work: ``docs/methods/fgfi.md``.

    Args:
        layer: The layer whose levels are compared, the one that the head reads.
        head: The student's head that has the anchors: ``'rpn_head'`` (default) or, for one-stage students, ``'bbox_head'``.
        psi: Fraction of an object's largest IoU, in [0, 1). Default 0.5.
        levels: Which levels an object marks: ``'best'`` (default), that of the anchor which overlaps it most, or ``'all'``.
        loss_weight: A number or a schedule. Default 0.01 from iteration 400 on, 0 before.
        adapter: A dict. ``'auto'`` and None, without convolutions where channels agree, are no FGFI.
        teacher_layer: The teacher's layer, where its name differs.

    Example:
        >>> distillers = dict(fgfi=dict(type='FGFI'))                     # Faster R-CNN
        >>> distillers = dict(fgfi=dict(type='FGFI', head='bbox_head'))   # RetinaNet, GFL, ATSS
    """

    renamed = {**FeatureDistiller.renamed, 'neck': 'layer', 'teacher_neck': 'teacher_layer'}

    def __init__(
        self,
        layer: str = 'neck',
        head: str = 'rpn_head',
        psi: float = 0.5,
        levels: str = 'best',
        loss_weight: float | Mapping = WEIGHT,
        adapter: str | Mapping | None = ADAPTER,
        teacher_layer: str | None = None,
    ):
        super().__init__(layer, loss_weight, teacher_layer, adapter)
        if not (is_number(psi) and 0 <= psi < 1):
            raise ConfigError(f'psi={psi!r}: expected a number, 0 <= psi < 1')
        if levels not in ('best', 'all'):
            raise ConfigError(f"levels={levels!r}: expected 'best' or 'all'")
        self.layer, self.head, self.psi, self.marks = layer, head, psi, levels

    def prepare(self, student: nn.Module, teacher: nn.Module) -> None:
        super().prepare(student, teacher)
        head = dense_head(find_layer(student, self.head))
        if not isinstance(head, AnchorDenseHead):
            raise ConfigError(
                f'{self.head!r} of the student ({type(head.head).__name__}) has no anchors, and FGFI selects locations by '
                f'them; use a method without, such as GID or FRS'
            )

    def setup(self, student: Taps, teacher: Taps) -> None:
        super().setup(student, teacher)
        head = dense_head(student.model.get_submodule(self.head))
        check_levels(self.layer, student[self.layer], self.head, head)
        if any(self.levels.adapters.resize):
            raise ConfigError(f'{self.layer!r}: student and teacher have different strides; FGFI needs the same')

    def masks(self, student: Taps, data_samples: list) -> list[torch.Tensor]:
        """Per level of the student's layer (B, H, W), bool."""
        head = dense_head(student.model.get_submodule(self.head))
        maps = (student[self.layer],)  # anchors depend on the maps' sizes alone
        anchors = [
            each.view(*level.shape[2:], -1, 4)
            for level, each in zip(maps[0], head.anchors(maps).split(head.sizes(maps)), strict=True)
        ]
        truth = ground_truth(data_samples)
        return imitation_masks(anchors, truth.boxes, truth.valid, self.psi, self.marks)

    def pictures(self, student: Taps, teacher: Taps, data_samples: list | None) -> dict[str, torch.Tensor]:
        return {f'mask, level {level}': each for level, each in enumerate(self.masks(student, data_samples))}

    def forward(self, student: Taps, teacher: Taps, data_samples: list | None) -> dict[str, torch.Tensor]:
        masks = self.masks(student, data_samples)
        pairs = self.levels(student, teacher)
        total = sum(imitation_loss(pair.student, pair.teacher, masks[pair.student_level]) for pair in pairs)
        return {'loss': self.loss_weight() * total}
