"""Class logits of segmentors: what methods that compare them need to hold."""

import torch
import torch.nn.functional as F
from torch import nn

from mmkd.distillers.levels import maps
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


def resize_logits(logits: torch.Tensor, size: tuple[int, ...], model: nn.Module) -> torch.Tensor:
    """Logits (B, K, h, w) at another size, as the model's decode head resizes them for its loss."""
    return F.interpolate(logits, tuple(size), mode='bilinear', align_corners=decode_head(model).align_corners)
