"""Labels that a source gives to the unlabelled images of a batch, in the step in which the student learns them: pseudo labels.

What mmdet's semi-supervised detectors do with an average of the student's weights (Xu et al., "End-to-End Semi-Supervised
Object Detection with Soft Teacher", ICCV 2021, arXiv 2106.09018), here by any frozen teacher, for detectors and segmentors.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from mmengine.model import BaseModel
from mmengine.structures import InstanceData, PixelData
from torch import nn

from mmkd.distillers.schedule import Weight
from mmkd.errors import ConfigError, nearest
from mmkd.hosts.detection.ignored import ASSIGNERS, UNWEIGHTED, assigners
from mmkd.hosts.segmentation.heads import decode_head, surest
from mmkd.sources.source import Source
from mmkd.values import is_number

PREFIX = 'unlabelled'
"""What the log keys of these images' losses start with."""
OPTIONS = ('teacher', 'score', 'uncertain', 'weight')
LEAST_SIDE = 0.01
"""In pixels; mmdet's semi-supervised detectors leave smaller boxes out as well."""


class TeacherLabels:
    """The labels of unlabelled images.

    Detectors: a box whose score is at least ``score`` is an object, and one at least ``uncertain`` is neither an object nor
    background: an anchor or a proposal without an object of which more than half lies in it is left out of the losses.
    Segmentors: a pixel has the teacher's class where its probability is at least ``score``, and else the label that losses
    ignore. Classes are those of the source's ``classes``; of its others no label is made.

    Args:
        teacher: The name of the source that labels, a ``Teacher`` or an ``Average``. Default None: the only one.
        score: The least probability, above 0 and at most 1. Default 0.5.
        uncertain: For detectors, below ``score``. Default None: what is no object is background.
        weight: Of the student's own losses on these images, a number or a schedule. Default 1.

    Raises:
        ConfigError: for scores that are none or not in this order, and for other options.
    """

    def __init__(
        self,
        teacher: str | None = None,
        score: float = 0.5,
        uncertain: float | None = None,
        weight: float | Mapping = 1.0,
    ):
        if teacher is not None and not isinstance(teacher, str):
            raise ConfigError(f"pseudo_labels.teacher={teacher!r}: expected a teacher's name")
        if not (is_number(score) and 0 < score <= 1):
            raise ConfigError(f'pseudo_labels.score={score!r}: expected a probability above 0, at most 1')
        if uncertain is not None and not (is_number(uncertain) and 0 <= uncertain < score):
            raise ConfigError(
                f'pseudo_labels.uncertain={uncertain!r}: expected a probability below score={score!r}, or None'
            )
        self.teacher, self.score, self.uncertain = teacher, score, uncertain
        self._weight = Weight(weight, 'pseudo_labels.weight')
        self._classes: torch.Tensor | None = None
        self._labelled_for: tuple[int, ...] | None = None
        self._ignore_index = 255
        self._source: Source

    @classmethod
    def read(cls, spec: object) -> 'TeacherLabels':
        """Of what a config has under ``pseudo_labels``.

        Raises:
            ConfigError: for what is no dict of its options.
        """
        if not isinstance(spec, Mapping):
            raise ConfigError(f'pseudo_labels={spec!r}: expected a dict such as dict(score=0.5)')
        for key in spec:
            if key not in OPTIONS:
                raise ConfigError(f'pseudo_labels has no option {key!r}; the nearest are {nearest(str(key), OPTIONS)}')
        return cls(**spec)

    def connect(self, student: nn.Module, sources: Mapping[str, Source]) -> None:
        """Find who labels, and refuse what cannot be labelled.

        Raises:
            ConfigError: for a source that is not there or does not label, other classes, or a student that needs other labels.
        """
        name = self.teacher
        if name is None:
            if len(sources) > 1:
                raise ConfigError(
                    f'pseudo_labels: there are several teachers, {", ".join(sources)}; name one, as in '
                    f'teacher={next(iter(sources))!r}'
                )
            name = next(iter(sources))
        if name not in sources:
            raise ConfigError(f'pseudo_labels.teacher={name!r}: there is none; there are {", ".join(sources)}')
        source = self._source = sources[name]
        kind = type(source).__name__
        if type(source).predict is Source.predict:
            raise ConfigError(
                f'pseudo_labels.teacher={name!r}: a {kind} labels no images; a Teacher or an Average does'
            )
        source.labels = True
        segments = hasattr(student, 'decode_head')
        if segments != hasattr(source.model, 'decode_head'):
            raise ConfigError(
                f'pseudo_labels: {type(source.model).__name__} labels no images for {type(student).__name__}; a detector takes '
                f'a detector, a segmentor a segmentor'
            )
        (_check_segmentors if segments else _check_detectors)(student, source.model)
        own, others = _classes(student), _classes(source.model)
        if source.classes is not None:
            source.classes.check(own, others)
            table = [-1] * others
            for index, of in zip(source.classes.student, source.classes.teacher, strict=True):
                table[of] = index
            self._classes = torch.tensor(table)
            if len(source.classes.student) < own:  # it says nothing of the others, which are no background
                self._labelled_for = tuple(source.classes.student)
        elif own != others:
            raise ConfigError(
                f'pseudo_labels: the teacher has {others} classes, and the student {own}; say which are which by the '
                f'classes of the teacher'
            )
        if segments:
            self._ignore_index = decode_head(student).ignore_index
            if self.uncertain is not None:
                raise ConfigError(
                    'pseudo_labels.uncertain: is for detectors; a pixel below score is ignored; leave it out'
                )
        elif self.uncertain is not None and not assigners(student):
            raise ConfigError(
                f'pseudo_labels.uncertain: {type(student).__name__} has heads that cannot leave places out (known are those '
                f'with {", ".join(ASSIGNERS)}, without {", ".join(UNWEIGHTED)}); leave it out'
            )

    def weight(self, iteration: int) -> float:
        """The weight of the losses in a step; 0 where the teacher is not read."""
        return self._weight.at(iteration) if self._source.due(iteration) else 0.0

    def __call__(
        self, student: nn.Module, inputs: torch.Tensor, data_samples: list
    ) -> tuple[list, float, dict[str, torch.Tensor]]:
        """Labels for a batch of unlabelled images, normalized for the student.

        Returns:
            Copies of the samples with labels; a factor for the losses, 0 where a detector has no object at all to learn
            from, as in mmdet; and statistics.
        """
        found = self._source.predict(student, inputs, data_samples)
        if hasattr(student, 'decode_head'):
            threshold = getattr(decode_head(self._source.model), 'threshold', None) or 0.5
            samples = [self._of_pixels(*each, threshold) for each in zip(data_samples, found, strict=True)]
            labelled = torch.stack(
                [(sample.gt_sem_seg.data != self._ignore_index).float().mean() for sample in samples]
            )
            return samples, 1.0, {'pixels': labelled.mean()}
        samples = [self._of_boxes(*each) for each in zip(data_samples, found, strict=True)]
        objects = sum(len(sample.gt_instances) for sample in samples)
        return samples, float(objects > 0), {'objects': torch.tensor(objects / len(samples))}

    def _own(self, labels: torch.Tensor) -> torch.Tensor:
        """The student's classes; -1 for none."""
        if self._classes is None:
            return labels
        if self._classes.device != labels.device:
            self._classes = self._classes.to(labels.device)
        return self._classes[labels]

    def _labelled(self, sample: Any) -> Any:
        """A copy without labels, marked as labelled for the classes that the teacher knows."""
        labelled = sample.new()
        if self._labelled_for is not None:
            labelled.set_metainfo(dict(labelled_for=self._labelled_for))
        return labelled

    def _of_boxes(self, sample: Any, found: InstanceData) -> Any:
        boxes, labels = found.bboxes.float(), self._own(found.labels)
        usable = (labels >= 0) & ((boxes[:, 2:] - boxes[:, :2]).amin(1) > LEAST_SIDE)
        certain = usable & (found.scores >= self.score)
        between = usable & ~certain & (found.scores >= (self.score if self.uncertain is None else self.uncertain))
        labelled = self._labelled(sample)
        labelled.gt_instances = InstanceData(bboxes=boxes[certain], labels=labels[certain])
        labelled.ignored_instances = InstanceData(bboxes=boxes[between], labels=labels[between])
        return labelled

    def _of_pixels(self, sample: Any, logits: torch.Tensor, threshold: float) -> Any:
        probability, labels = surest(logits, threshold)
        labels = self._own(labels)
        labels = labels.where((labels >= 0) & (probability >= self.score), self._ignore_index)
        height, width = sample.metainfo['img_shape'][:2]
        labels[height:], labels[:, width:] = self._ignore_index, self._ignore_index  # padding
        labelled = self._labelled(sample)
        labelled.gt_sem_seg = PixelData(data=labels[None])
        return labelled


def _classes(model: nn.Module) -> int:
    if hasattr(model, 'decode_head'):
        return decode_head(model).num_classes
    head = model.roi_head.bbox_head if hasattr(model, 'roi_head') else model.bbox_head
    return (head[-1] if isinstance(head, nn.ModuleList) else head).num_classes


def _check_detectors(student: nn.Module, teacher: BaseModel) -> None:
    for model in (student, teacher):
        if not (hasattr(model, 'bbox_head') or hasattr(getattr(model, 'roi_head', None), 'bbox_head')):
            raise ConfigError(f'pseudo_labels: {type(model).__name__} has no boxes; a detector of boxes is needed')
    if getattr(student, 'with_mask', False):
        raise ConfigError(
            f'pseudo_labels: {type(student).__name__} learns masks, and pseudo labels are boxes; write masks by mmdet'
        )
    if 'rescale' not in inspect.signature(teacher.predict).parameters:
        raise ConfigError(f'pseudo_labels: {type(teacher).__name__} labels no images; name the detector inside it')


def _check_segmentors(student: nn.Module, teacher: nn.Module) -> None:
    head = decode_head(teacher)
    if not hasattr(head, 'conv_seg'):
        raise ConfigError(
            f'pseudo_labels: how sure {type(head).__name__} is of a pixel is not known; a head that classifies by conv_seg is '
            f'needed'
        )
