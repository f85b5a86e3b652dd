"""Regions of interest: the student's own, and what both networks see in them."""

import inspect
from collections.abc import Sequence

import torch
from mmdet.models.roi_heads.bbox_heads import BBoxHead
from torch import nn

from mmkd.classes import ClassMap
from mmkd.errors import ConfigError
from mmkd.hosts.detection.dense_heads import DenseHead
from mmkd.taps import INPUT, Taps


class RoIHead:
    """The RoI head of one two-stage detector: the layers that distillers read, and its parts run on given RoIs.

    A student's RoIs are the ones that its own sampler drew in this step, ground truth among them where its config has
    ``add_gt_as_proposals``; its features of them are pooled already. A teacher is run on the same RoIs.

    Args:
        name: The RoI head, a dotted name.
        stage: The stage of a cascade, whose parts are lists.
    """

    def __init__(self, name: str = 'roi_head', stage: int | None = None):
        self.name, self.stage = name, stage
        suffix = '' if stage is None else f'.{stage}'
        self.extractor = f'{name}.bbox_roi_extractor{suffix}'
        self.bbox_head = f'{name}.bbox_head{suffix}'
        self.layers = (self.extractor, self.extractor + INPUT)
        """What has to be tapped for :meth:`rois` and :meth:`features`."""
        self.embedding = f'{self.bbox_head}.fc_cls{INPUT}'
        """What the classifier takes in, (n, D): a region's last features."""

    def check(self, student: nn.Module) -> None:
        """Raise ConfigError unless :meth:`rois` and :meth:`features` can be read from this student."""
        stages = _stages(student, self.name)
        kind = type(student).__name__
        if stages is None:
            raise ConfigError(
                f'the student ({kind}) has no {self.name!r} with boxes; name its head, if it is one-stage'
            )
        if stages:
            RoIHead(self.name, stages[0]).check_input(student, 'student')
        if stages and self.stage not in stages:
            raise ConfigError(
                f'{self.name!r} of the student ({kind}) is a cascade, found stage={self.stage!r}; name the stage that '
                f'learns, stage={stages[0]} to {stages[-1]}'
            )
        if not stages and self.stage is not None:
            raise ConfigError(
                f'stage={self.stage!r}: {self.name!r} of the student ({kind}) is no cascade; leave it out'
            )
        self.check_input(student, 'student')

    def of_teacher(self, teacher: nn.Module, stage: int | None = None) -> 'RoIHead':
        """The teacher's RoI head of the same name.

        Args:
            teacher: The teacher.
            stage: Its stage, where it is a cascade. None for the student's.

        Raises:
            ConfigError: if the teacher has none, or no such stage.
        """
        kind = type(teacher).__name__
        stages = _stages(teacher, self.name)
        if stages is None:
            raise ConfigError(f'the teacher ({kind}) has no {self.name!r} with boxes; a two-stage teacher is needed')
        if not stages:
            if stage is not None:
                raise ConfigError(
                    f'teacher_stage={stage!r}: {self.name!r} of the teacher ({kind}) is no cascade; leave it out'
                )
            return RoIHead(self.name)
        chosen = self.stage if stage is None else stage
        if chosen not in stages:
            raise ConfigError(
                f'{self.name!r} of the teacher ({kind}) is a cascade, found teacher_stage={chosen!r}; name the stage to '
                f'learn from, teacher_stage={stages[0]} to {stages[-1]}'
            )
        return RoIHead(self.name, chosen)

    def check_input(self, model: nn.Module, whose: str) -> None:
        """Raise ConfigError if the box head needs more than the pooled features, as Double-Head's and Sparse R-CNN's do."""
        head = model.get_submodule(self.bbox_head)
        inputs = list(inspect.signature(head.forward).parameters)
        if len(inputs) != 1:
            raise ConfigError(
                f'{self.bbox_head!r} of the {whose} ({type(head).__name__} of {type(model).__name__}) takes '
                f'{" and ".join(inputs)}; a head that takes one pooled feature for each region is needed, as that of Faster R-CNN'
            )

    def rois(self, student: Taps) -> torch.Tensor:
        """(n, 5): index of the image, then xyxy in pixels of the padded input; no gradient."""
        return student[self.extractor + INPUT][1].detach()

    def features(self, student: Taps) -> torch.Tensor:
        """(n, C, h, w): what the student pooled from its RoIs."""
        return student[self.extractor][0]

    def pool(self, taps: Taps, layer: str, rois: torch.Tensor) -> torch.Tensor:
        """(n, C, h, w): a network's features of RoIs, pooled from the levels of ``layer`` as its own RoI head does."""
        extractor = taps.model.get_submodule(self.extractor)
        # mmcv's RoIAlign reads memory in the order of NCHW, whatever the strides say
        levels = [level.contiguous() for level in taps[layer][: extractor.num_inputs]]
        return extractor(levels, rois)

    def predict(self, taps: Taps, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A network's class logits, (n, classes + 1) with the background last, and deltas, (n, 4 or 4 * classes)."""
        roi_head = taps.model.get_submodule(self.name)
        if roi_head.with_shared_head:
            features = roi_head.shared_head(features)
        return taps.model.get_submodule(self.bbox_head)(features)

    def embed(self, taps: Taps, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What a network's classifier takes in, (n, D), and what :meth:`predict` returns."""
        with Taps(taps.model, [self.embedding]) as read:
            logits, deltas = self.predict(taps, features)
        return read[self.embedding][0], logits, deltas


def check_same_regions(student: tuple[RoIHead, nn.Module], teacher: tuple[RoIHead, nn.Module]) -> None:
    """Raise ConfigError unless two detectors' RoI heads pool regions of the same size."""
    sizes = [tuple(model.get_submodule(head.extractor).roi_layers[0].output_size) for head, model in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise ConfigError(
            f'{student[0].extractor!r} pools {sizes[0]} (student) and {sizes[1]} (teacher) cells; make them equal'
        )


def check_same_predictions(
    student: tuple[RoIHead, nn.Module],
    teacher: tuple[RoIHead, nn.Module],
    method: str,
    boxes: bool = True,
    classes: ClassMap | None = None,
) -> None:
    """Raise ConfigError unless two detectors' box heads predict the same classes, and deltas in one unit.

    Args:
        student: The student's RoI head, and the student.
        teacher: The teacher's, and the teacher.
        method: Who compares them, for the error.
        boxes: Whether deltas are compared as well as classes.
        classes: Which classes are compared, where they are not all the same.
    """
    said = []
    for (roi_head, model), whose in ((student, 'student'), (teacher, 'teacher')):
        roi_head.check_input(model, whose)
        head = model.get_submodule(roi_head.bbox_head)
        if not isinstance(head, BBoxHead) or not head.with_cls or (boxes and not head.with_reg):
            raise ConfigError(
                f'{roi_head.bbox_head!r} of the {whose} ({type(head).__name__} of {type(model).__name__}) does not predict '
                f'{"classes and boxes" if boxes else "classes"} as a BBoxHead does; {method} compares them'
            )
        said.append([head.num_classes])
        if boxes:
            said[-1] += [head.reg_class_agnostic, tuple(head.bbox_coder.stds)]
    if classes is not None:
        classes.check(said[0][0], said[1][0])
    elif said[0] != said[1]:
        what = '(classes, class-agnostic boxes, stds of deltas)' if boxes else 'classes'
        raise ConfigError(
            f'{student[0].bbox_head!r} differs in {what}: {tuple(said[0])} (student), {tuple(said[1])} (teacher); {method} '
            f'compares them'
        )


def _stages(model: nn.Module, roi_head: str) -> range | None:
    """The stages of a cascade, an empty range for a RoI head that is none, None where there is no RoI head."""
    try:
        model.get_submodule(f'{roi_head}.bbox_roi_extractor')
        bbox_head = model.get_submodule(f'{roi_head}.bbox_head')
    except AttributeError:
        return None
    return range(len(bbox_head)) if isinstance(bbox_head, nn.ModuleList) else range(0)


def to_rois(boxes: torch.Tensor) -> torch.Tensor:
    """(B, K, 4) boxes as (B * K, 5) RoIs, the index of the image first."""
    index = torch.arange(len(boxes), device=boxes.device, dtype=boxes.dtype)
    return torch.cat([index[:, None, None].expand(-1, boxes.shape[1], 1), boxes], 2).flatten(0, 1)


@torch.no_grad()
def best_predictions(head: DenseHead, outputs: tuple, number: int, metas: Sequence[dict]) -> torch.Tensor:
    """The boxes of the slots with the highest class score, of each image; the proposals of a one-stage detector.

    Args:
        head: The dense head.
        outputs: The dense head's outputs.
        number: Boxes per image.
        metas: Each image's meta data; boxes are clipped to its ``img_shape``.

    Returns:
        (B, number, 4), xyxy in pixels, best first. Fewer than ``number`` where there are fewer slots.
    """
    return boxes_of_slots(head, outputs, best_slots(head, outputs, number), metas)


@torch.no_grad()
def best_slots(head: DenseHead, outputs: tuple, number: int) -> torch.Tensor:
    """(B, number), the slots with the highest class score of each image, best first; fewer where there are fewer."""
    logits = head.class_logits(outputs)
    best = torch.cat([level.amax(2).permute(0, 2, 3, 1).flatten(1) for level in logits], 1)
    return best.topk(min(number, best.shape[1]), dim=1)[1]


@torch.no_grad()
def boxes_of_slots(head: DenseHead, outputs: tuple, slots: torch.Tensor, metas: Sequence[dict]) -> torch.Tensor:
    """(B, K, 4): what a dense head predicts at slots, (B, K), xyxy in pixels, clipped to each image's ``img_shape``."""
    regression = head.regression(outputs).gather(1, slots[..., None].expand(-1, -1, 4))
    return clip(head.decode(head.priors(outputs)[slots], regression), metas)


def clip(boxes: torch.Tensor, metas: Sequence[dict]) -> torch.Tensor:
    """(B, K, 4) boxes cut to their images, without the padding."""
    limits = torch.tensor([[*meta['img_shape'][1::-1]] * 2 for meta in metas], dtype=boxes.dtype)
    return torch.minimum(boxes.clamp(min=0), limits.to(boxes.device, non_blocking=True)[:, None])
