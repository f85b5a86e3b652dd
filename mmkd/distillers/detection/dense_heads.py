"""What a distiller needs to know about a dense head: its slots' class logits, boxes and assignment.

A slot is one prediction of a dense head: an anchor, or a location. Slots are in mmdet's order: level, row,
column, anchor. A head of another kind is added from anywhere:

    >>> @dense_head.register(MyHead)
    ... class MyDenseHead(DenseHead): ...
"""

import functools
from collections.abc import Sequence

import torch
from mmdet.models.dense_heads import AnchorHead
from mmdet.models.task_modules.assigners import BboxOverlaps2D, MaxIoUAssigner
from mmdet.models.task_modules.coders import DeltaXYWHBBoxCoder
from mmdet.models.task_modules.prior_generators import anchor_inside_flags
from torch import nn

from mmkd.distillers.detection.boxes import decode_deltas, pairwise_iou
from mmkd.errors import ConfigError


@functools.singledispatch
def dense_head(head: nn.Module) -> 'DenseHead':
    """The :class:`DenseHead` for a detector's head.

    Raises:
        ConfigError: for a head that nobody has registered.
    """
    raise ConfigError(
        f'{type(head).__name__}: how to read this head is not known; RetinaNet-like heads are, others are added with '
        f'mmkd.distillers.detection.dense_heads.dense_head.register'
    )


@dense_head.register(AnchorHead)
class DenseHead:
    """A dense head with anchors, sigmoid class scores and boxes as deltas: RetinaNet's, and its like.

    Args:
        head: The detector's head.

    Raises:
        ConfigError: where the head has softmax scores or codes its boxes otherwise.
    """

    def __init__(self, head: nn.Module):
        if not head.use_sigmoid_cls:
            raise ConfigError(f'{type(head).__name__} has softmax class scores; a head with sigmoid scores is needed')
        coder = head.bbox_coder
        if type(coder) is not DeltaXYWHBBoxCoder or head.reg_decoded_bbox or getattr(coder, 'add_ctr_clamp', False):
            raise ConfigError(
                f'{type(head).__name__} does not predict boxes as deltas (DeltaXYWHBBoxCoder, reg_decoded_bbox=False)'
            )
        self.head = head

    @property
    def classes(self) -> int:
        return self.head.cls_out_channels

    @property
    def strides(self) -> list[int]:
        """The stride of each level, in pixels."""
        return [stride[0] for stride in self.head.prior_generator.strides]

    @property
    def unit(self) -> str:
        """What the regression means; two heads can be compared where this is equal."""
        coder = self.head.bbox_coder
        return f'deltas with means {tuple(coder.means)} and stds {tuple(coder.stds)}'

    def class_logits(self, outputs: tuple) -> list[torch.Tensor]:
        """Per level (B, A, C, H, W): A slots at each location, C class logits each."""
        return [level.unflatten(1, (-1, self.classes)) for level in outputs[0]]

    def regression(self, outputs: tuple) -> torch.Tensor:
        """(B, slots, 4), in the head's unit."""
        return torch.cat([level.permute(0, 2, 3, 1).reshape(len(level), -1, 4) for level in outputs[1]], dim=1)

    def priors(self, outputs: tuple) -> torch.Tensor:
        """(slots, 4), xyxy in pixels."""
        sizes = tuple(tuple(level.shape[2:]) for level in outputs[0])
        return _grid_priors(self.head.prior_generator, sizes, outputs[0][0].device)

    def decode(self, priors: torch.Tensor, regression: torch.Tensor) -> torch.Tensor:
        """Boxes, xyxy in pixels, for priors and regression of shape (..., 4)."""
        return decode_deltas(priors, regression, self.head.bbox_coder.means, self.head.bbox_coder.stds)

    def check_assigner(self) -> None:
        """Raise ConfigError unless :meth:`assigned` can follow the head's assigner."""
        assigner = getattr(self.head, 'assigner', None)
        if (
            type(assigner) is not MaxIoUAssigner
            or assigner.perm_repeat_gt_cfg is not None
            or type(assigner.iou_calculator) is not BboxOverlaps2D
        ):
            raise ConfigError(
                f'{type(self.head).__name__} assigns boxes to slots with {type(assigner).__name__}; MaxIoUAssigner '
                f'is needed, with BboxOverlaps2D and without perm_repeat_gt_cfg'
            )

    def assigned(self, outputs: tuple, boxes: torch.Tensor, valid: torch.Tensor, metas: Sequence[dict]) -> torch.Tensor:
        """The slots that the detector's own assigner would give to ``boxes`` if they were ground truth.

        Args:
            outputs: The head's outputs.
            boxes: (B, K, 4), xyxy in pixels.
            valid: (B, K), False for a box that is not there.
            metas: Each image's meta data.

        Returns:
            (B, slots), bool.
        """
        priors = self.priors(outputs)
        return max_iou_assigned(self.head.assigner, priors, boxes, valid, self._inside(priors, outputs, metas))

    def _inside(self, priors: torch.Tensor, outputs: tuple, metas: Sequence[dict]) -> torch.Tensor:
        """(B, slots): the slots that the head is trained on, as its ``get_targets`` has it."""
        sizes = [level.shape[2:] for level in outputs[0]]
        border = self.head.train_cfg['allowed_border']
        flags = []
        for meta in metas:
            shape = meta.get('pad_shape', meta['img_shape'])
            levels = self.head.prior_generator.valid_flags(sizes, shape, device=priors.device)
            flags.append(anchor_inside_flags(priors, torch.cat(levels), meta['img_shape'][:2], border))
        return torch.stack(flags)


@functools.lru_cache(maxsize=8)
def _grid_priors(generator: object, sizes: tuple[tuple[int, int], ...], device: torch.device) -> torch.Tensor:
    """All levels' priors, (slots, 4); kept, as making them waits for the device at each level."""
    return torch.cat(generator.grid_priors(sizes, device=device))


def max_iou_assigned(
    assigner: MaxIoUAssigner, priors: torch.Tensor, boxes: torch.Tensor, valid: torch.Tensor, inside: torch.Tensor
) -> torch.Tensor:
    """Which priors ``MaxIoUAssigner.assign`` makes positive, for a batch of images at once.

    The assigner itself loops over the boxes and waits for the device at each; which box a prior belongs to is
    not needed here.

    Args:
        assigner: Its thresholds are used.
        priors: (N, 4).
        boxes: (B, K, 4).
        valid: (B, K), False for a box that is not there.
        inside: (B, N), False for priors that take no part.

    Returns:
        (B, N), bool.
    """
    overlaps = pairwise_iou(boxes, priors.expand(len(boxes), -1, -1))  # (B, K, N)
    overlaps = overlaps.masked_fill(~(valid[:, :, None] & inside[:, None]), -1)
    positive = overlaps.amax(1) >= assigner.pos_iou_thr
    if assigner.match_low_quality:
        best, index = overlaps.max(2, keepdim=True)
        # a box that touches no prior has best 0, which mmdet would match with every prior
        matched = (best >= assigner.min_pos_iou) & (best > 0)
        if assigner.gt_max_assign_all:
            positive |= ((overlaps == best) & matched).any(1)
        else:
            positive |= torch.zeros_like(overlaps, dtype=torch.bool).scatter_(2, index, matched).any(1)
    return positive
