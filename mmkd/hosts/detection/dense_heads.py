"""What a distiller needs to know about a dense head: its slots' class logits, boxes and assignment.

A slot is one prediction of a dense head: an anchor, or a location. Slots are in mmdet's order: level, row,
column, anchor. A head of another kind is added from anywhere:

    >>> @dense_head.register(MyHead)
    ... class MyDenseHead(DenseHead): ...
"""

import copy
import functools
from collections.abc import Mapping, Sequence

import torch
from mmcv.cnn import ConvModule
from mmdet.models.dense_heads import (
    AnchorHead,
    ATSSHead,
    FCOSHead,
    GFLHead,
    LDHead,
    RetinaHead,
    RetinaSepBNHead,
    RPNHead,
)
from mmdet.models.task_modules.assigners import ATSSAssigner, BboxOverlaps2D, MaxIoUAssigner
from mmdet.models.task_modules.coders import DeltaXYWHBBoxCoder
from mmdet.models.task_modules.prior_generators import anchor_inside_flags
from torch import nn

from mmkd.classes import ClassMap
from mmkd.errors import ConfigError
from mmkd.hosts.detection.assigners import atss, max_iou_assigned
from mmkd.hosts.detection.boxes import decode_deltas


@functools.singledispatch
def dense_head(head: nn.Module) -> 'DenseHead':
    """The :class:`DenseHead` for a detector's head.

    Raises:
        ConfigError: for a head that nobody has registered.
    """
    raise ConfigError(
        f'{type(head).__name__}: how to read this head is not known; heads with anchors (RetinaNet, RPN, ATSS), GFL '
        f'and FCOS are, others are added with '
        f'mmkd.hosts.detection.dense_heads.dense_head.register'
    )


class DenseHead:
    """A dense head with sigmoid class scores.

    Args:
        head: The detector's head.

    Raises:
        ConfigError: where the head does not predict as is expected here.
    """

    unit: str
    """What the regression means; two heads can be compared where this is equal."""
    of_mmdet: tuple[type, ...] = ()
    """mmdet's heads that are read so. Others of mmdet that inherit from them put out something else."""

    def __init__(self, head: nn.Module):
        if type(head).__module__.startswith('mmdet.') and type(head) not in self.of_mmdet:
            raise ConfigError(
                f'{type(head).__name__}: how to read this head of mmdet is not known (its parent class is); add it with '
                f'mmkd.hosts.detection.dense_heads.dense_head.register'
            )
        if not head.use_sigmoid_cls:
            raise ConfigError(f'{type(head).__name__} has softmax class scores; a head with sigmoid scores is needed')
        self.head = head

    @property
    def classes(self) -> int:
        return self.head.cls_out_channels

    @property
    def strides(self) -> list[int]:
        """The stride of each level, in pixels."""
        return [stride[0] for stride in self.head.prior_generator.strides]

    def class_logits(self, outputs: tuple) -> list[torch.Tensor]:
        """Per level (B, A, C, H, W): A slots at each location, C class logits each."""
        return [level.unflatten(1, (-1, self.classes)) for level in outputs[0]]

    def slot_logits(self, outputs: tuple) -> torch.Tensor:
        """(B, slots, C): the class logits of all levels."""
        return torch.cat([level.permute(0, 3, 4, 1, 2).flatten(1, 3) for level in self.class_logits(outputs)], dim=1)

    def regression(self, outputs: tuple) -> torch.Tensor:
        """(B, slots, 4), in the head's unit."""
        return torch.cat([level.permute(0, 2, 3, 1).reshape(len(level), -1, 4) for level in outputs[1]], dim=1)

    def priors(self, outputs: tuple) -> torch.Tensor:
        """(slots, 4), in the form that :meth:`decode` takes."""
        raise NotImplementedError(f'{type(self).__name__} has no priors')

    def decode(self, priors: torch.Tensor, regression: torch.Tensor) -> torch.Tensor:
        """Boxes, xyxy in pixels, for priors and regression of shape (..., 4)."""
        raise NotImplementedError(f'{type(self).__name__} has no decode')

    def in_image(self, outputs: tuple, metas: Sequence[dict]) -> torch.Tensor:
        """(B, slots), bool: those whose location is not in what pads an image to the size of the batch."""
        sizes, device = [tuple(level.shape[2:]) for level in outputs[0]], outputs[0][0].device
        shapes = [meta.get('pad_shape', meta['img_shape']) for meta in metas]
        return torch.stack(
            [_valid_flags(self.head.prior_generator, tuple(sizes), tuple(shape), device) for shape in shapes]
        )

    def check_assigner(self) -> None:
        """Raise ConfigError unless :meth:`assigned` can follow the head's assigner."""
        raise NotImplementedError(f'{type(self).__name__} has no check_assigner')

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
        raise NotImplementedError(f'{type(self).__name__} has no assigned')


def check_same_slots(
    student: tuple[DenseHead, tuple],
    teacher: tuple[DenseHead, tuple],
    method: str,
    boxes: bool = True,
    classes: ClassMap | None = None,
) -> None:
    """Raise ConfigError unless two heads have the same classes and the same slots, so that they can be compared slot by slot.

    Args:
        student: The student's head and its outputs for an image.
        teacher: The teacher's head and its outputs for the same image.
        method: Who compares them, for the error.
        boxes: Whether boxes are compared as well, which takes one unit.
        classes: Which classes are compared, where they are not all the same.
    """
    (s, s_outputs), (t, t_outputs) = student, teacher
    if classes is not None:
        classes.check(s.classes, t.classes)
    elif s.classes != t.classes:
        raise ConfigError(
            f'the heads predict {s.classes} (student) and {t.classes} (teacher) classes, and {method} compares them class by '
            f'class; use a teacher that was trained on the same classes, or KD and the classes of the teacher'
        )
    if boxes and s.unit != t.unit:
        raise ConfigError(f'the heads predict boxes in different units: {s.unit} (student), {t.unit} (teacher)')
    shapes = [
        [(*level.shape[:2], *level.shape[3:]) for level in head.class_logits(outputs)]
        for head, outputs in (student, teacher)
    ]
    if shapes[0] != shapes[1]:
        raise ConfigError(
            f'the heads have different slots (image, anchors, height, width per level): {shapes[0]} (student), '
            f'{shapes[1]} (teacher); {method} needs the same strides and the same number of anchors'
        )
    if s.unit == t.unit and not torch.equal(s.priors(s_outputs), t.priors(t_outputs)):
        raise ConfigError(
            f'the heads have different anchors (anchor_generator: scales, ratios or centers), and {method} compares them '
            f'anchor by anchor; give both the same'
        )


def check_levels(
    layer: str, levels: Sequence[torch.Tensor], name: str, head: DenseHead, whose: str = 'student'
) -> None:
    """Raise ConfigError unless a layer has a level for each stride of a head, so that it can be what the head reads.

    Args:
        layer: The layer's name.
        levels: The layer's levels.
        name: The head's name.
        head: The head, for its strides.
        whose: ``'student'`` or ``'teacher'``, for the error.
    """
    if len(levels) != len(head.strides):
        raise ConfigError(
            f'{layer!r} of the {whose} has {len(levels)} levels and {name!r} {len(head.strides)} strides; name the layer that '
            f'the head reads'
        )


TOWERS = ('cls_convs', 'reg_convs')
"""The convolutions before a head's two predictors, as mmdet's heads call them."""


def check_towers(head: nn.Module, name: str, least: int) -> None:
    """Raise ConfigError unless a head has two towers of convolutions that its levels share, of at least so many each.

    Args:
        head: The head.
        name: Its name, for the error.
        least: The number.
    """
    for tower in TOWERS:
        convolutions = getattr(head, tower, None)
        if not isinstance(convolutions, nn.ModuleList) or not all(
            isinstance(each, ConvModule) for each in convolutions
        ):
            raise ConfigError(
                f'{name!r} ({type(head).__name__}) has no {tower} that its levels share, as the heads of RetinaNet, ATSS, GFL '
                f'and FCOS have'
            )
        if len(convolutions) < least:
            raise ConfigError(
                f'{name!r} ({type(head).__name__}) has {len(convolutions)} {tower}, and position counts {least}; set position '
                f'to at most {len(convolutions)}'
            )


def predict_from(head: nn.Module, position: int, features: Mapping[str, Sequence[torch.Tensor]]) -> tuple:
    """What a head puts out for features that stand for what its first convolutions put out.

    Args:
        head: A head with :data:`TOWERS`.
        position: How many convolutions of each tower they stand for.
        features: By tower a map for each level, (B, C, H, W).
    """
    copied = copy.copy(head)  # with the same parameters
    copied._modules = dict(head._modules)
    for tower, levels in features.items():
        copied._modules[tower] = nn.ModuleList([_Given(levels), *getattr(head, tower)[position:]])
    # what each level's pass begins with is not looked at; and `forward`, as a compiled head would still call the original
    return copied.forward(tuple(features[TOWERS[0]]))


class _Given(nn.Module):
    """Puts out, call by call, what it was given."""

    def __init__(self, levels: Sequence[torch.Tensor]):
        super().__init__()
        self.levels = iter(levels)

    def forward(self, feature: torch.Tensor) -> torch.Tensor:
        return next(self.levels)


@dense_head.register(AnchorHead)
class AnchorDenseHead(DenseHead):
    """A head with anchors and boxes as deltas from them: RetinaNet's, an RPN, ATSS."""

    of_mmdet = (AnchorHead, RetinaHead, RetinaSepBNHead, RPNHead, ATSSHead)

    def __init__(self, head: nn.Module):
        super().__init__(head)
        coder = head.bbox_coder
        if type(coder) is not DeltaXYWHBBoxCoder or getattr(coder, 'add_ctr_clamp', False):
            raise ConfigError(f'{type(head).__name__} does not predict boxes as deltas (DeltaXYWHBBoxCoder)')

    @property
    def unit(self) -> str:
        coder = self.head.bbox_coder
        return f'deltas with means {tuple(coder.means)} and stds {tuple(coder.stds)}'

    def sizes(self, outputs: tuple) -> list[int]:
        """Slots of each level."""
        return [level[0, 0].numel() * self.head.num_base_priors for level in outputs[0]]

    def anchors(self, outputs: tuple) -> torch.Tensor:
        """(slots, 4), xyxy in pixels."""
        sizes = tuple(tuple(level.shape[2:]) for level in outputs[0])
        return _grid_priors(self.head.prior_generator, sizes, outputs[0][0].device)

    def priors(self, outputs: tuple) -> torch.Tensor:
        return self.anchors(outputs)

    def decode(self, priors: torch.Tensor, regression: torch.Tensor) -> torch.Tensor:
        return decode_deltas(priors, regression, self.head.bbox_coder.means, self.head.bbox_coder.stds)

    def check_assigner(self) -> None:
        assigner = getattr(self.head, 'assigner', None)
        max_iou = type(assigner) is MaxIoUAssigner and assigner.perm_repeat_gt_cfg is None
        atss = type(assigner) is ATSSAssigner and assigner.alpha is None
        if not (max_iou or atss) or type(assigner.iou_calculator) is not BboxOverlaps2D:
            raise ConfigError(
                f'{type(self.head).__name__} assigns boxes to slots with {type(assigner).__name__}; MaxIoUAssigner '
                f'(without perm_repeat_gt_cfg) or ATSSAssigner (without alpha) is needed, with BboxOverlaps2D'
            )

    def assigned(self, outputs: tuple, boxes: torch.Tensor, valid: torch.Tensor, metas: Sequence[dict]) -> torch.Tensor:
        anchors, assigner = self.anchors(outputs), self.head.assigner
        inside = self.inside(anchors, outputs, metas)
        if isinstance(assigner, ATSSAssigner):
            return atss(assigner.topk, anchors, self.sizes(outputs), boxes, valid, inside).positive.any(1)
        return max_iou_assigned(assigner, anchors, boxes, valid, inside)

    def inside(self, anchors: torch.Tensor, outputs: tuple, metas: Sequence[dict]) -> torch.Tensor:
        """(B, slots): the slots that the head is trained on, as its ``get_targets`` has it."""
        border = self.head.train_cfg['allowed_border']
        flags = [
            anchor_inside_flags(anchors, valid, meta['img_shape'][:2], border)
            for valid, meta in zip(self.in_image(outputs, metas), metas, strict=True)
        ]
        return torch.stack(flags)


class DistanceDenseHead(DenseHead):
    """A head whose regression is the distances from a location to the box's left, top, right and bottom side.

    The distances are in units of the level's stride; priors are (x, y, stride, stride).
    """

    unit = 'distances to the sides, in strides'

    def decode(self, priors: torch.Tensor, regression: torch.Tensor) -> torch.Tensor:
        distances = regression * priors[..., 2:].repeat_interleave(2, -1)
        return torch.cat([priors[..., :2] - distances[..., :2], priors[..., :2] + distances[..., 2:]], -1)


@dense_head.register(GFLHead)
class DistributionDenseHead(DistanceDenseHead, AnchorDenseHead):
    """A head that predicts a distribution of each distance: GFL. Its regression is their means."""

    of_mmdet = (GFLHead, LDHead)

    def __init__(self, head: nn.Module):
        DenseHead.__init__(self, head)

    def distributions(self, outputs: tuple) -> torch.Tensor:
        """Logits, (B, slots, 4, n + 1), of the distances 0 to n in strides."""
        bins = self.head.reg_max + 1
        return torch.cat([each.permute(0, 2, 3, 1).reshape(len(each), -1, 4, bins) for each in outputs[1]], dim=1)

    def regression(self, outputs: tuple) -> torch.Tensor:
        logits = self.distributions(outputs)
        return logits.softmax(-1) @ torch.arange(logits.shape[-1], device=logits.device, dtype=logits.dtype)

    def priors(self, outputs: tuple) -> torch.Tensor:
        anchors = self.anchors(outputs)
        stride = _per_slot(tuple(self.strides), tuple(self.sizes(outputs)), anchors.device)
        return torch.cat([(anchors[:, :2] + anchors[:, 2:]) / 2, stride, stride], 1)


@dense_head.register(FCOSHead)
class PointDenseHead(DistanceDenseHead):
    """A head of locations without anchors: FCOS. In whatever unit it puts out distances, here they are in strides."""

    of_mmdet = (FCOSHead,)

    @property
    def strides(self) -> list[int]:
        return list(self.head.strides)

    def regression(self, outputs: tuple) -> torch.Tensor:
        # with `norm_on_bbox` mmdet's head puts out strides in training and pixels in evaluation, else always pixels
        in_strides = self.head.norm_on_bbox and self.head.training
        levels = [
            level if in_strides else level / stride for level, stride in zip(outputs[1], self.strides, strict=True)
        ]
        return super().regression((outputs[0], levels))

    def priors(self, outputs: tuple) -> torch.Tensor:
        sizes = tuple(tuple(level.shape[2:]) for level in outputs[0])
        points = _grid_priors(self.head.prior_generator, sizes, outputs[0][0].device)
        stride = _per_slot(tuple(self.strides), tuple(h * w for h, w in sizes), points.device)
        return torch.cat([points, stride, stride], 1)

    def check_assigner(self) -> None:
        pass  # FCOS has no other way to assign than its own

    def assigned(self, outputs: tuple, boxes: torch.Tensor, valid: torch.Tensor, metas: Sequence[dict]) -> torch.Tensor:
        priors = self.priors(outputs)
        sizes = tuple(level[0, 0].numel() for level in outputs[0])
        ranges = [_per_slot(tuple(limit), sizes, priors.device)[:, 0] for limit in zip(*self.head.regress_ranges)]
        points, boxes = priors[:, :2], boxes[:, :, None]
        distances = torch.cat([points - boxes[..., :2], boxes[..., 2:] - points], -1)  # (B, K, slots, 4)
        largest = distances.amax(-1)
        inside = distances.amin(-1) > 0
        if self.head.center_sampling:
            center, radius = (boxes[..., :2] + boxes[..., 2:]) / 2, priors[:, 2:] * self.head.center_sample_radius
            top_left = torch.maximum(center - radius, boxes[..., :2])
            bottom_right = torch.minimum(center + radius, boxes[..., 2:])
            inside = torch.cat([points - top_left, bottom_right - points], -1).amin(-1) > 0
        return (inside & (largest >= ranges[0]) & (largest <= ranges[1]) & valid[:, :, None]).any(1)


# With `keep_ratio` COCO has dozens of padded sizes, of two networks. One costs 3.2 MB of a RetinaNet at 800x1344, and a 16th of
# that for its flags.
KEPT = 64


@functools.lru_cache(KEPT)
def _per_slot(values: tuple[float, ...], sizes: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """One value per level, repeated for each of its slots, (slots, 1)."""
    return torch.cat([torch.full((size, 1), float(value)) for value, size in zip(values, sizes)]).to(device)


@functools.lru_cache(KEPT)
def _valid_flags(
    generator: object, sizes: tuple[tuple[int, int], ...], shape: tuple[int, ...], device: torch.device
) -> torch.Tensor:
    """Of all levels' priors, (slots,), those in an image of a height and width; kept, as a step asks for them more than once."""
    return torch.cat(generator.valid_flags(sizes, shape, device=device))


@functools.lru_cache(KEPT)
def _grid_priors(generator: object, sizes: tuple[tuple[int, int], ...], device: torch.device) -> torch.Tensor:
    """All levels' priors, (slots, 4); kept, as making them waits for the device at each level."""
    return torch.cat(generator.grid_priors(sizes, device=device))
