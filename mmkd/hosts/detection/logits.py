"""Class logits of detectors: of the slots of a dense head, and of a RoI head's regions."""

import torch
from torch import nn

from mmkd.distillers.levels import match_levels, require_gradient
from mmkd.errors import ConfigError
from mmkd.hosts.class_logits import ClassLogits, LogitsReader
from mmkd.hosts.detection.dense_heads import DenseHead, check_same_slots, dense_head
from mmkd.hosts.detection.rois import RoIHead, check_same_predictions, check_same_regions
from mmkd.taps import INPUT, Taps, find_layer


class SlotLogits(LogitsReader):
    """Those of a dense head with sigmoid scores, all levels together, (B, C, slots).

    Args:
        head: The student's head, a dotted name.
        teacher_head: The teacher's.
    """

    sigmoid = True

    def __init__(self, head: str, teacher_head: str):
        super().__init__()
        self.head, self.teacher_head = head, teacher_head
        self.student_layers, self.teacher_layers = (head,), (teacher_head,)

    def prepare(self, student: nn.Module, teacher: nn.Module) -> None:
        for model, head in ((student, self.head), (teacher, self.teacher_head)):
            dense_head(find_layer(model, head))

    def _heads(self, student: Taps, teacher: Taps) -> tuple[DenseHead, DenseHead]:
        return (
            dense_head(student.model.get_submodule(self.head)),
            dense_head(teacher.model.get_submodule(self.teacher_head)),
        )

    def setup(self, student: Taps, teacher: Taps) -> None:
        s, t = self._heads(student, teacher)
        if teacher.scale == 1:
            check_same_slots(
                (s, student[self.head]), (t, teacher[self.teacher_head]), 'KD', boxes=False, classes=teacher.classes
            )
            self.pairs = [(level, level) for level in range(len(s.strides))]
            return
        own, others = s.class_logits(student[self.head]), t.class_logits(teacher[self.teacher_head])
        same = [(level.flatten(1, 2) for level in levels) for levels in (own, others)]
        self.pairs = match_levels(*map(list, same), 'stride', (self.head, self.teacher_head))
        for i, j in self.pairs:
            if own[i].shape[1] != others[j].shape[1]:
                raise ConfigError(
                    f'the heads have {own[i].shape[1]} (student) and {others[j].shape[1]} (teacher) anchors at each location; '
                    f'KD needs as many'
                )
        if teacher.classes is not None:
            teacher.classes.check(s.classes, t.classes)
        elif s.classes != t.classes:
            raise ConfigError(f'the heads predict {s.classes} (student) and {t.classes} (teacher) classes; set classes')

        if s.unit == t.unit:
            sizes = [[level[0, :, 0].numel() for level in levels] for levels in (own, others)]
            priors = s.priors(student[self.head]).split(sizes[0]), t.priors(teacher[self.teacher_head]).split(sizes[1])
            for i, j in self.pairs:
                if not torch.allclose(priors[0][i] * teacher.scale, priors[1][j], atol=1e-3):
                    raise ConfigError(
                        f'level {i} of the student and {j} of the teacher have different anchors for scale={teacher.scale}, and '
                        f'KD compares them anchor by anchor; give both the same'
                    )

    def positions(self, student: Taps, teacher: Taps) -> list[tuple[int, ...]]:
        return [tuple(i for i, _ in self.pairs)]

    def forward(self, student: Taps, teacher: Taps, data_samples: list | None) -> list[ClassLogits]:
        s, t = self._heads(student, teacher)
        levels = s.class_logits(student[self.head]), t.class_logits(teacher[self.teacher_head])
        own, other = (
            torch.cat([levels[side][pair[side]].transpose(1, 2).flatten(2) for pair in self.pairs], 2)
            for side in (0, 1)
        )
        require_gradient(self.head, [own])
        if teacher.classes is not None:
            own, other = teacher.classes.of_student(own), teacher.classes.of_teacher(other)
        return [ClassLogits(own, other.detach(), True, None, teacher.classes)]


class RegionLogits(LogitsReader):
    """Those of a RoI head at the student's own regions, (n, classes + 1); the teacher is run over the same regions.

    Args:
        head: The RoI head, a dotted name.
        layer: The layer whose levels the teacher pools.
        method: Who compares them, for errors.
    """

    def __init__(self, head: str, layer: str = 'neck', method: str = 'KD'):
        super().__init__()
        self.roi_head, self.layer, self.method = RoIHead(head), layer, method
        self.student_layers = (*self.roi_head.layers, self.roi_head.bbox_head)
        self.teacher_layers = (layer,)
        self.label_layers = (f'{self.roi_head.bbox_head}.loss_cls{INPUT}',)

    def prepare(self, student: nn.Module, teacher: nn.Module) -> None:
        name = self.roi_head.name
        for model, whose, option in ((student, 'student', 'stage'), (teacher, 'teacher', 'teacher_stage')):
            if isinstance(getattr(getattr(model, name, None), 'bbox_head', None), nn.ModuleList):
                RoIHead(name, 0).check_input(model, whose)
                raise ConfigError(
                    f'{name!r} of the {whose} ({type(model).__name__}) is a cascade, whose stages {self.method} does not tell '
                    f'apart; for its classes use Mimic with cls_weight and {option}'
                )
        self.roi_head.check(student)
        self.teacher_head = self.roi_head.of_teacher(teacher)
        if getattr(student.get_submodule(self.roi_head.bbox_head), 'custom_cls_channels', False):
            raise ConfigError(f'{self.roi_head.bbox_head!r}: its channels are no classes; a softmax head is needed')

    def setup(self, student: Taps, teacher: Taps) -> None:
        heads = (self.roi_head, student.model), (self.teacher_head, teacher.model)
        check_same_regions(*heads)
        check_same_predictions(*heads, self.method, boxes=False, classes=teacher.classes)

    def forward(self, student: Taps, teacher: Taps, data_samples: list | None) -> list[ClassLogits]:
        own = student[self.roi_head.bbox_head][0]
        require_gradient(self.roi_head.bbox_head, [own])
        with torch.no_grad():
            rois = self.roi_head.rois(student)
            if teacher.scale != 1:
                rois = torch.cat([rois[:, :1], rois[:, 1:] * teacher.scale], 1)
            features = self.teacher_head.pool(teacher, self.layer, rois)
            other = self.teacher_head.predict(teacher, features)[0].float()
        if teacher.classes is not None:
            own, other = teacher.classes.of_student(own, True), teacher.classes.of_teacher(other, True)
        return [ClassLogits(own, other, False, None, teacher.classes)]

    def labels(self, logits: ClassLogits, student: Taps, data_samples: list | None) -> torch.Tensor:
        """Of each region the class that the student's head is trained to say, the background among them."""
        if student.calls.get(self.label_layers[0]) == 0:  # no region, or no image with labels
            return torch.full((len(logits.student),), -1, device=logits.student.device)
        return student.per_call(self.label_layers[0])[0][1]
