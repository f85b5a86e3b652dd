"""Class logits of segmentors: what methods that compare them need to hold."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from mmkd.distillers.levels import LevelPairs, maps, require_gradient
from mmkd.errors import ConfigError
from mmkd.hosts.segmentation.heads import classifiers, decode_head
from mmkd.taps import Taps


def require_class_logits(student: Taps, layer: str, teacher: Taps, teacher_layer: str) -> None:
    """Raise ConfigError unless both layers put out logits of the same classes, of which there are at least two."""
    own, other = (maps(taps, name)[0].shape[1] for taps, name in ((student, layer), (teacher, teacher_layer)))
    if own != other:
        raise ConfigError(
            f'{layer!r} puts out {own} channels and {teacher_layer!r} of the teacher {other}; class logits of the same classes '
            f'are needed: tap {_classifiers(student)}, and of a teacher that was trained on the same classes '
            f'{_classifiers(teacher)}'
        )
    if own < 2:
        raise ConfigError(
            f'{layer!r} puts out one channel, of which a softmax over classes is always 1; use decode heads with out_channels=2'
        )


def _classifiers(taps: Taps) -> str:
    return ' or '.join(map(repr, classifiers(taps.model))) or 'its class logits'


def resize_logits(logits: torch.Tensor, size: Sequence[int], model: nn.Module) -> torch.Tensor:
    """Logits (B, K, h, w) at another size, as the model's decode head resizes them for its loss."""
    return F.interpolate(logits, tuple(size), mode='bilinear', align_corners=decode_head(model).align_corners)


def compared_logits(
    levels: LevelPairs, student: Taps, teacher: Taps, size: Sequence[int] | None = None
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The pairs of both networks' logits, (B, K, h, w) each, the student's with gradient.

    Args:
        levels: Which layers they are of.
        student: The student's taps.
        teacher: The teacher's.
        size: Height and width to which each network's own are resized, as its decode head does. None: the student's are
            resized to the teacher's where they differ.
    """
    if size is None:
        return [(pair.student, pair.teacher) for pair in levels(student, teacher)]
    own, others = levels.unadapted(student, teacher)
    require_gradient(', '.join(levels.student_layers), own)
    return [
        (resize_logits(s, size, student.model), resize_logits(t, size, teacher.model))
        for s, t in zip(own, others, strict=True)
    ]
