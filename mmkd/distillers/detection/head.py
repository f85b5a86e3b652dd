"""Hetero-assists distillation (HEAD): a head of the teacher's kind on the student's features.

Wang et al., "HEAD: HEtero-Assists Distillation for Heterogeneous Object Detectors", ECCV 2022, arXiv 2207.05345.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from mmcv.ops import RoIAlign
from mmdet.models.losses import CrossEntropyLoss
from mmdet.models.roi_heads.bbox_heads import BBoxHead
from mmdet.models.task_modules.coders import DeltaXYWHBBoxCoder
from torch import nn

from mmkd.adapters import Adapters
from mmkd.distillers.base import Distiller
from mmkd.distillers.detection.gdetkd import draw_regions
from mmkd.distillers.levels import maps, require_gradient
from mmkd.distillers.schedule import Weight
from mmkd.errors import ConfigError
from mmkd.hosts.detection.boxes import encode_deltas, pairwise_iou
from mmkd.hosts.detection.dense_heads import TOWERS, check_levels, check_towers, dense_head
from mmkd.hosts.detection.ground_truth import GroundTruth, ground_truth, ground_truth_labels
from mmkd.hosts.detection.roi_pool import box_levels
from mmkd.hosts.detection.rois import RoIHead, best_slots, boxes_of_slots, to_rois
from mmkd.registry import DISTILLERS
from mmkd.taps import INPUT, Taps, find_layer
from mmkd.values import is_whole

WEIGHT = dict(type='linear', value=2.0, end=2000)
POSITIVE_IOU, POSITIVE_FRACTION = 0.5, 0.25
"""Of mmdet's two-stage detectors."""


class Regions(NamedTuple):
    """What the assistant is trained with."""

    boxes: torch.Tensor
    """(B, K, 4), xyxy in pixels of the padded input."""
    locations: torch.Tensor
    """(B, K), where the student's head predicted each, counted over all levels, row by row."""
    predicted: torch.Tensor
    """(B, K), False for an object of the ground truth, which no location predicted."""


def assign_regions(
    boxes: torch.Tensor, truth: GroundTruth, labels: torch.Tensor, background: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The class of each region and the box that it should have been: those of the object that it overlaps most.

    Args:
        boxes: (B, K, 4).
        truth: The objects, N at most in an image.
        labels: (B, N), their classes.
        background: The class of a region that overlaps no object by an IoU of 0.5.

    Returns:
        Classes, (B, K), and boxes, (B, K, 4), of background those of any object, or 0.
    """
    overlaps = pairwise_iou(boxes, truth.boxes.to(boxes.dtype)) * truth.valid[:, None]
    overlap, index = overlaps.max(2)
    own = truth.boxes.gather(1, index[..., None].expand(-1, -1, 4))
    return torch.where(overlap >= POSITIVE_IOU, labels.gather(1, index), background), own


def head_loss(
    head: nn.Module,
    logits: torch.Tensor,
    deltas: torch.Tensor,
    rois: torch.Tensor,
    labels: torch.Tensor,
    boxes: torch.Tensor,
) -> torch.Tensor:
    """A box head's own losses of classes and boxes, over all regions as mmdet has them, and without waiting for the device.

    Args:
        head: The head, for its losses and its coder.
        logits: (n, classes + 1), the background last.
        deltas: (n, 4 * classes), or (n, 4) for a class-agnostic head.
        rois: (n, 4), what the deltas are relative to.
        labels: (n,), the number of classes for background.
        boxes: (n, 4), the target of a region that is none.

    Returns:
        Their sum, a scalar.
    """
    count, objects = max(len(labels), 1), labels < head.num_classes
    target = encode_deltas(rois, boxes, head.bbox_coder.means, head.bbox_coder.stds)
    target = torch.where(objects[:, None], target, 0.0)
    of_class = labels.clamp(max=head.num_classes - 1) if deltas.shape[1] > 4 else torch.zeros_like(labels)
    own = deltas.unflatten(1, (-1, 4)).gather(1, of_class[:, None, None].expand(-1, 1, 4))[:, 0]
    # a weight of 0 would do, but mmdet's losses of boxes ask the device whether all of them are
    own = torch.where(objects[:, None], own, 0.0)
    return head.loss_cls(logits, labels, avg_factor=count) + head.loss_bbox(own, target, avg_factor=count)


@DISTILLERS.register_module()
class HEAD(Distiller):
    """A one-stage student learns from a two-stage teacher by an assistant, a head of the teacher's kind on its own features.

    The assistant is a copy of the teacher's box head and starts from its weights. It reads the student's pyramid, is trained
    along, and left out by ``mmkd export``. Its regions are drawn of the student's best predictions and the ground truth.

    - ``loss_assistant``: the assistant's own :func:`head_loss`, by labels. It trains the student's backbone and neck too.
    - ``loss_akd``: the mean square between what the layers after each of its shared linear ones take in and what those of the
      teacher's head do, over the same regions, after a linear layer for each; summed over layers.
    - ``loss_ckd``: the same between the student's classification tower at the location that predicted a region, after a linear
      layer, and what the teacher's classifier takes in.

    By default the last two rise linearly over 2000 iterations. Differences from the authors' code: ``docs/methods/head.md``.

    Args:
        layer: The layer whose levels the assistant pools, the one that the student's head reads.
        head: The student's dense head.
        roi_head: The teacher's RoI head.
        assistant_weight: Weight of ``loss_assistant``, a number or a schedule, as all weights. Default 1.
        akd_weight: Weight of ``loss_akd``. Default ``dict(type='linear', value=2.0, end=2000)``.
        ckd_weight: Weight of ``loss_ckd``. Default ``dict(type='linear', value=2.0, end=2000)``.
        regions_per_image: Regions per image. Default 512.
        candidates: The best predictions per image that they are drawn from. Default 1000.
        adapter: ``'auto'`` (1x1 convolution exactly where channels differ), None or a dict. One serves all levels.
        teacher_layer: The teacher's layer, where its name differs.
        teacher_stage: The teacher's stage, where its RoI head is a cascade.

    Example:
        >>> distillers = dict(head=dict(type='HEAD'))
    """

    compares_classes = True

    def __init__(
        self,
        layer: str = 'neck',
        head: str = 'bbox_head',
        roi_head: str = 'roi_head',
        assistant_weight: float | Mapping = 1.0,
        akd_weight: float | Mapping = WEIGHT,
        ckd_weight: float | Mapping = WEIGHT,
        regions_per_image: int = 512,
        candidates: int = 1000,
        adapter: str | Mapping | None = 'auto',
        teacher_layer: str | None = None,
        teacher_stage: int | None = None,
    ):
        super().__init__()
        for name, value in (('regions_per_image', regions_per_image), ('candidates', candidates)):
            if not (is_whole(value) and value >= 1):
                raise ConfigError(f'{name}={value!r}: expected a whole number of at least 1')
        self.layer, self.head, self.teacher_layer = layer, head, teacher_layer or layer
        self.roi_head, self.teacher_stage = RoIHead(roi_head), teacher_stage
        self.regions_per_image, self.candidates, self.adapter = regions_per_image, candidates, adapter
        self.assistant_weight = Weight(assistant_weight, 'assistant_weight')
        self.akd_weight, self.ckd_weight = Weight(akd_weight, 'akd_weight'), Weight(ckd_weight, 'ckd_weight')
        self.student_layers, self.teacher_layers = (layer, head), (self.teacher_layer,)

    def prepare(self, student: nn.Module, teacher: nn.Module) -> None:
        head = find_layer(student, self.head)
        classes = dense_head(head).classes
        check_towers(head, self.head, 1)
        self.tower = f'{self.head}.{TOWERS[0]}.{len(getattr(head, TOWERS[0])) - 1}'
        self.student_layers = (self.layer, self.head, self.tower)
        self.teacher_roi_head = self.roi_head.of_teacher(teacher, self.teacher_stage)
        self.teacher_roi_head.check_input(teacher, 'teacher')
        if teacher.get_submodule(self.roi_head.name).with_shared_head:
            raise ConfigError(
                f'{self.roi_head.name!r} of the teacher has a shared head; HEAD copies the box head alone'
            )
        self._check_box_head(teacher.get_submodule(self.teacher_roi_head.bbox_head), classes)
        pool = teacher.get_submodule(self.teacher_roi_head.extractor).roi_layers[0]
        if not isinstance(pool, RoIAlign):
            raise ConfigError(
                f"the teacher's {self.teacher_roi_head.extractor!r} pools with {type(pool).__name__}, not RoIAlign"
            )

    def _check_box_head(self, head: nn.Module, classes: int) -> None:
        name = f'{self.teacher_roi_head.bbox_head!r} of the teacher ({type(head).__name__})'
        if not isinstance(head, BBoxHead) or not (head.with_cls and head.with_reg):
            raise ConfigError(f'{name} does not predict classes and boxes as a BBoxHead does; HEAD trains a copy of it')
        softmax = type(head.loss_cls) is CrossEntropyLoss and not head.loss_cls.use_sigmoid
        if not softmax or type(head.bbox_coder) is not DeltaXYWHBBoxCoder or head.reg_decoded_bbox:
            raise ConfigError(
                f'{name} is not trained by a softmax over classes and by deltas, as that of Faster R-CNN is; HEAD trains a copy '
                f'of it'
            )
        if head.num_classes != classes:
            raise ConfigError(
                f'{name} predicts {head.num_classes} classes, {self.head!r} of the student {classes}; HEAD trains a copy of the '
                f"teacher's head with the student's labels"
            )

    def setup(self, student: Taps, teacher: Taps) -> None:
        levels = maps(student, self.layer)
        head = dense_head(student.model.get_submodule(self.head))
        check_levels(self.layer, levels, self.head, head)
        self.strides = head.strides
        extractor = teacher.model.get_submodule(self.teacher_roi_head.extractor)
        pool = extractor.roi_layers[0]
        # mmcv's RoIAlign, as the teacher's
        self.poolers = [
            RoIAlign(pool.output_size, 1 / stride, pool.sampling_ratio, aligned=pool.aligned) for stride in self.strides
        ]
        channels = levels[0].shape[1], extractor.out_channels
        self.adapters = Adapters.of_regions(self.adapter, *channels, (self.layer, self.teacher_layer))
        box_head = teacher.model.get_submodule(self.teacher_roi_head.bbox_head)
        self.assistant = copy.deepcopy(box_head).requires_grad_(True)
        shared = len(getattr(box_head, 'shared_fcs', ()))
        # what the layers after them take in, as they are followed by a ReLU in place
        self.embeddings = (*(f'shared_fcs.{index}{INPUT}' for index in range(1, shared)), f'fc_cls{INPUT}')
        device = next(box_head.parameters()).device
        with torch.no_grad():
            region = torch.zeros(1, extractor.out_channels, *pool.output_size, device=device)
            lengths = [each.shape[1] for each in run_head(box_head, region, self.embeddings)[0]]
        self.assisted = nn.ModuleList(nn.Linear(length, length) for length in lengths)
        self.crossed = nn.Linear(maps(student, self.tower)[0].shape[1], lengths[-1])

    def start_from(self, teacher: nn.Module) -> None:
        self.assistant.load_state_dict(teacher.get_submodule(self.teacher_roi_head.bbox_head).state_dict())

    @torch.no_grad()
    def draw(self, student: Taps, truth: GroundTruth, data_samples: Sequence) -> Regions:
        """Regions of the student's best predictions and of the ground truth, at most a quarter of them objects."""
        head = dense_head(student.model.get_submodule(self.head))
        slots = best_slots(head, student[self.head], self.candidates)
        boxes = boxes_of_slots(head, student[self.head], slots, [sample.metainfo for sample in data_samples])
        known, there = truth.boxes.to(boxes.dtype), truth.valid
        # where there is no object, the best prediction once more
        boxes = torch.cat([boxes, torch.where(there[..., None], known, boxes[:, :1])], 1)
        slots = torch.cat([slots, slots[:, :1].expand_as(there)], 1)
        predicted = F.pad(~there, (boxes.shape[1] - there.shape[1], 0), value=True)
        overlaps = pairwise_iou(boxes, known) * there[:, None]
        chosen = draw_regions(overlaps.amax(2) >= POSITIVE_IOU, self.regions_per_image, POSITIVE_FRACTION)
        anchors = head.class_logits(student[self.head])[0].shape[1]
        return Regions(
            boxes.gather(1, chosen[..., None].expand(-1, -1, 4)),
            slots.gather(1, chosen) // anchors,
            predicted.gather(1, chosen),
        )

    def pool(self, levels: Sequence[torch.Tensor], boxes: torch.Tensor) -> torch.Tensor:
        """(B * K, C, h, w): the student's features of boxes, (B, K, 4), each of the level that its size gives."""
        rois, of_box = to_rois(boxes), box_levels(boxes, self.strides).flatten()
        pooled: torch.Tensor | float = 0.0
        for index, (pool, level) in enumerate(zip(self.poolers, levels, strict=True)):
            here = (of_box == index).to(level.dtype)
            # a region of another level is an empty box, which takes next to no samples;
            # mmcv's RoIAlign reads memory in the order of NCHW, whatever the strides say
            found = pool(level.contiguous(), rois * here[:, None])
            pooled = pooled + here[:, None, None, None] * found
        return pooled

    def forward(self, student: Taps, teacher: Taps, data_samples: list | None) -> dict[str, torch.Tensor]:
        levels, samples = maps(student, self.layer), data_samples or []
        require_gradient(self.layer, levels)
        truth = ground_truth(samples)
        regions = self.draw(student, truth, samples)
        rois = to_rois(regions.boxes)
        with torch.no_grad():
            target = self.teacher_roi_head.pool(teacher, self.teacher_layer, rois)
            box_head = teacher.model.get_submodule(self.teacher_roi_head.bbox_head)
            targets, _, _ = run_head(box_head, target, self.embeddings)
        (features,) = self.adapters([self.pool(levels, regions.boxes)], [target])
        embeddings, logits, deltas = run_head(self.assistant, features, self.embeddings)
        labels, boxes = assign_regions(regions.boxes, truth, ground_truth_labels(samples), self.assistant.num_classes)
        assisted = [
            F.mse_loss(linear(own), other)
            for linear, own, other in zip(self.assisted, embeddings, targets, strict=True)
        ]
        tower = torch.cat([level.flatten(2) for level in maps(student, self.tower)], 2)
        places = regions.locations[:, None].expand(-1, tower.shape[1], -1)
        crossed = self.crossed(tower.gather(2, places).transpose(1, 2).flatten(0, 1))
        predicted = regions.predicted.flatten()
        difference = (crossed - targets[-1]).square().mean(1) * predicted
        own = head_loss(self.assistant, logits, deltas, rois[:, 1:], labels.flatten(), boxes.flatten(0, 1))
        return {
            'loss_assistant': self.assistant_weight() * own,
            'loss_akd': self.akd_weight() * sum(assisted),
            'loss_ckd': self.ckd_weight() * difference.sum() / predicted.sum().clamp(min=1),
        }


def run_head(
    head: nn.Module, features: torch.Tensor, layers: Sequence[str]
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """What layers of a box head take in for pooled features, (n, D) each, and its class logits and deltas."""
    with Taps(head, layers) as taps:
        logits, deltas = head(features)
    return [taps[layer][0] for layer in layers], logits, deltas
