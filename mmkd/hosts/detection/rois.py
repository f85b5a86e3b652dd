"""Regions of interest: the student's own, and what both networks see in them."""

from collections.abc import Sequence

import torch
from torch import nn

from mmkd.errors import ConfigError
from mmkd.hosts.detection.dense_heads import DenseHead
from mmkd.taps import INPUT, Taps


class RoIHead:
    """The layers of a two-stage detector's RoI head that distillers read.

    A student's RoIs are the ones that its own sampler drew in this step, ground truth among them where its config has
    ``add_gt_as_proposals``; its features of them are pooled already. The teacher is run on the same RoIs.

    Args:
        roi_head: The RoI head, a dotted name. Of a cascade, whose parts are lists, give one ``stage``.
        stage: The stage of a cascade.
    """

    def __init__(self, roi_head: str = 'roi_head', stage: int | None = None):
        self.name = roi_head
        suffix = '' if stage is None else f'.{stage}'
        self.extractor = f'{roi_head}.bbox_roi_extractor{suffix}'
        self.bbox_head = f'{roi_head}.bbox_head{suffix}'
        self.layers = (self.extractor, self.extractor + INPUT)
        """What a student has to tap for :meth:`rois` and :meth:`features`."""
        self.embedding = f'{self.bbox_head}.fc_cls{INPUT}'
        """What the classifier takes in, (n, D): a region's last features."""

    def rois(self, student: Taps) -> torch.Tensor:
        """(n, 5): index of the image, then xyxy in pixels of the padded input; no gradient."""
        return student[self.extractor + INPUT][1].detach()

    def features(self, student: Taps) -> torch.Tensor:
        """(n, C, h, w): what the student pooled from its RoIs."""
        return student[self.extractor][0]

    def check(self, student: Taps, teacher: Taps) -> None:
        """Raise ConfigError unless the teacher has a RoI head that pools RoIs of the same size."""
        self.check_teacher(teacher)
        sizes = [_pooled_size(taps.model.get_submodule(self.extractor)) for taps in (student, teacher)]
        if sizes[0] != sizes[1]:
            raise ConfigError(
                f'{self.extractor!r} pools {sizes[0]} (student) and {sizes[1]} (teacher) cells; make them equal'
            )

    def check_teacher(self, teacher: Taps) -> None:
        """Raise ConfigError unless the teacher has this RoI head."""
        try:
            teacher.model.get_submodule(self.extractor)
            teacher.model.get_submodule(self.bbox_head)
        except AttributeError:
            raise ConfigError(
                f'the teacher ({type(teacher.model).__name__}) has no {self.extractor!r}; a two-stage teacher is needed'
            ) from None

    def check_predictions(self, student: Taps, teacher: Taps, method: str) -> None:
        """Raise ConfigError unless both box heads predict the same classes, and deltas in one unit; ``method`` asks."""
        heads = [taps.model.get_submodule(self.bbox_head) for taps in (student, teacher)]
        said = [(head.num_classes, head.reg_class_agnostic, tuple(head.bbox_coder.stds)) for head in heads]
        if said[0] != said[1]:
            raise ConfigError(
                f'{self.bbox_head!r} differs in (classes, class-agnostic boxes, stds of deltas): {said[0]} (student), '
                f'{said[1]} (teacher); {method} compares them'
            )

    def pool(self, taps: Taps, neck: str, rois: torch.Tensor) -> torch.Tensor:
        """(n, C, h, w): a model's features of RoIs, pooled as its own RoI head does."""
        extractor = taps.model.get_submodule(self.extractor)
        # mmcv's RoIAlign reads memory in the order of NCHW, whatever the strides say
        levels = [level.contiguous() for level in taps[neck][: extractor.num_inputs]]
        return extractor(levels, rois)

    @torch.no_grad()
    def pool_teacher(self, teacher: Taps, neck: str, rois: torch.Tensor) -> torch.Tensor:
        """:meth:`pool` for the teacher."""
        return self.pool(teacher, neck, rois)

    @torch.no_grad()
    def predict_teacher(self, teacher: Taps, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The teacher's class logits, (n, classes + 1) with the background last, and deltas, (n, 4 or 4 * classes)."""
        roi_head = teacher.model.get_submodule(self.name)
        if roi_head.with_shared_head:
            features = roi_head.shared_head(features)
        return teacher.model.get_submodule(self.bbox_head)(features)

    @torch.no_grad()
    def embed_teacher(self, teacher: Taps, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the teacher's classifier takes in, (n, D), and what :meth:`predict_teacher` returns."""
        with Taps(teacher.model, [self.embedding]) as taps:
            logits, deltas = self.predict_teacher(teacher, features)
        return taps[self.embedding][0], logits, deltas


def _pooled_size(extractor: nn.Module) -> tuple[int, int]:
    return tuple(extractor.roi_layers[0].output_size)


def to_rois(boxes: torch.Tensor) -> torch.Tensor:
    """(B, K, 4) boxes as (B * K, 5) RoIs, the index of the image first."""
    index = torch.arange(len(boxes), device=boxes.device, dtype=boxes.dtype)
    return torch.cat([index[:, None, None].expand(-1, boxes.shape[1], 1), boxes], 2).flatten(0, 1)


@torch.no_grad()
def best_predictions(head: DenseHead, outputs: tuple, number: int, metas: Sequence[dict]) -> torch.Tensor:
    """The boxes of the slots with the highest class score, of each image; the proposals of a one-stage detector.

    Args:
        head: The dense head.
        outputs: What it put out.
        number: Boxes per image.
        metas: Each image's meta data; boxes are clipped to its ``img_shape``.

    Returns:
        (B, number, 4), xyxy in pixels, best first. Fewer than ``number`` where there are fewer slots.
    """
    logits = head.class_logits(outputs)
    best = torch.cat([level.amax(2).permute(0, 2, 3, 1).flatten(1) for level in logits], 1)
    slots = best.topk(min(number, best.shape[1]), dim=1)[1]
    regression = head.regression(outputs).gather(1, slots[..., None].expand(-1, -1, 4))
    boxes = head.decode(head.priors(outputs)[slots], regression)
    return clip(boxes, metas)


def clip(boxes: torch.Tensor, metas: Sequence[dict]) -> torch.Tensor:
    """(B, K, 4) boxes cut to their images, without the padding."""
    limits = torch.tensor([[*meta['img_shape'][1::-1]] * 2 for meta in metas], dtype=boxes.dtype)
    return torch.minimum(boxes.clamp(min=0), limits.to(boxes.device, non_blocking=True)[:, None])
