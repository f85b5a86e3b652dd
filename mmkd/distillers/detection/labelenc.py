"""Intermediate supervision by encoded labels (LabelEnc).

Hao et al., "LabelEnc: A New Intermediate Supervision Method for Object Detection", ECCV 2020, arXiv 2007.03282.
"""

from collections.abc import Mapping

import torch
from torch import nn

from mmkd.distillers.base import Distiller
from mmkd.distillers.detection.lgd import adapted_distance, three_convolutions
from mmkd.distillers.levels import maps, require_gradient
from mmkd.distillers.schedule import Weight
from mmkd.errors import ConfigError
from mmkd.hosts.detection.ground_truth import ground_truth
from mmkd.registry import DISTILLERS
from mmkd.sources.label_encoder import LabelPyramid
from mmkd.taps import Taps


@DISTILLERS.register_module()
class LabelEnc(Distiller):
    """The neck's maps follow the labels' pyramid, which a :class:`mmkd.sources.LabelEncoder` makes.

    ``loss``: :func:`mmkd.distillers.detection.lgd.normalized_distance` of the neck's maps, after three 3x3 convolutions, to the
    labels', by layer norm.

    It takes two trainings. In the first the encoder is trained along, and the distance brings both spaces together; the
    authors begin with it after 30000 of 120000 steps. In the second the encoder is frozen. In steps in which ``loss_weight``
    is 0, the convolutions alone learn the distance, at weight 1. A batch without a box has a loss of 0. Differences from
    paper and code: ``docs/methods/labelenc.md``.

    Args:
        loss_weight: Weight of ``loss``; a number or a schedule. Default 1.

    Example:
        >>> teacher = dict(type='LabelEncoder', checkpoint='work_dirs/labelenc_step1_retinanet/epoch_16.pth')
        >>> distillers = dict(labelenc=dict(type='LabelEnc'))
    """

    student_layers = ('neck',)
    teacher_layers = ('pyramid',)
    unweighted = True

    def __init__(self, loss_weight: float | Mapping = 1.0):
        super().__init__()
        self.loss_weight = Weight(loss_weight, 'loss_weight')

    def prepare(self, student: nn.Module, teacher: nn.Module) -> None:
        if not isinstance(teacher, LabelPyramid):
            raise ConfigError(
                f'LabelEnc learns from labels, found a {type(teacher).__name__} as its teacher; use '
                f"teacher=dict(type='LabelEncoder')"
            )

    def setup(self, student: Taps, teacher: Taps) -> None:
        channels = sorted({level.shape[1] for level in maps(student, 'neck')})
        if len(channels) > 1:
            raise ConfigError(
                f'the neck puts out {", ".join(map(str, channels))} channels; LabelEnc needs as many on all levels'
            )
        self.adapter = three_convolutions(channels[0])

    def forward(self, student: Taps, teacher: Taps, data_samples: list | None) -> dict[str, torch.Tensor]:
        features = maps(student, 'neck')
        require_gradient('neck', features)
        any_object = ground_truth(data_samples or []).valid.any()
        distance = adapted_distance(self.adapter, features, maps(teacher, 'pyramid'), (1, 2, 3), self.loss_weight())
        return {'loss': any_object * distance}
