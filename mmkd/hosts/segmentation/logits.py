"""Class logits of segmentors: what methods that compare them need to hold."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from mmkd.distillers.levels import Layer, LevelPairs, maps, require_gradient
from mmkd.errors import ConfigError
from mmkd.hosts.class_logits import ClassLogits, LogitsReader
from mmkd.hosts.segmentation.heads import classifiers, decode_head, logits_layer
from mmkd.hosts.segmentation.labels import ground_truth, labeled, labels_at
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


class PixelLogits(LogitsReader):
    """Those of a segmentor's decode head, (B, K, H, W).

    Args:
        layer: The student's layers; None for the decode head's classifier.
        teacher_layer: The teacher's; None for as the student's.
        label_size: Whether both are first resized to the size of the labels.
        use_labels: Whether pixels whose label is ignored do not count.
    """

    has_labels = True

    def __init__(
        self,
        layer: Layer | Sequence[Layer] | None,
        teacher_layer: Layer | Sequence[Layer] | None,
        label_size: bool = False,
        use_labels: bool = True,
    ):
        super().__init__()
        self.levels = LevelPairs(layer or logits_layer, teacher_layer)
        self.label_size, self.use_labels = label_size, use_labels

    def prepare(self, student: nn.Module, teacher: nn.Module) -> None:
        self.levels.prepare(student, teacher)
        self.student_layers, self.teacher_layers = self.levels.student_layers, self.levels.teacher_layers

    def setup(self, student: Taps, teacher: Taps) -> None:
        if teacher.classes is None:
            for layer, other in zip(self.student_layers, self.teacher_layers):
                require_class_logits(student, layer, teacher, other)
        else:
            teacher.classes.check(decode_head(student.model).num_classes, decode_head(teacher.model).num_classes)
            if len(teacher.classes.student) < 2:
                raise ConfigError(
                    'classes: a single class, of which a softmax over classes is always 1; name two or more'
                )
            self.levels.same_channels = False
        self.levels.setup(student, teacher)

    def positions(self, student: Taps, teacher: Taps) -> list[tuple[int, ...]]:
        if self.label_size:
            return []
        return [tuple(target.shape[2:]) for target in self.levels.unadapted(student, teacher)[1]]

    def forward(self, student: Taps, teacher: Taps, data_samples: list | None) -> list[ClassLogits]:
        size = ground_truth(data_samples).shape[1:] if self.label_size else None
        found = []
        for s, t in compared_logits(self.levels, student, teacher, size):
            valid = labeled(student.model, data_samples, s.shape[2:]) if self.use_labels else None
            if teacher.classes is not None:
                s, t = teacher.classes.of_student(s), teacher.classes.of_teacher(t)
            found.append(ClassLogits(s, t.detach(), False, valid, teacher.classes))
        return found

    def labels(self, logits: ClassLogits, student: Taps, data_samples: list | None) -> torch.Tensor:
        labels = labels_at(student.model, data_samples, logits.student.shape[2:])
        return labels.masked_fill(labels == decode_head(student.model).ignore_index, -1)
