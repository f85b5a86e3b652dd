"""Task-oriented feature distillation (TOFD): the features that heads classify, by adapters that lose nothing.

Zhang, Shi, Shi, Ma, Bao, "Task-Oriented Feature Distillation", NeurIPS 2020.
"""

import functools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from mmkd.distillers.base import Distiller
from mmkd.distillers.levels import LevelPairs
from mmkd.distillers.schedule import Weight
from mmkd.errors import ConfigError
from mmkd.hosts.segmentation.heads import auxiliary_feature_layers, feature_layer
from mmkd.registry import DISTILLERS
from mmkd.taps import Taps


def feature_distance(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    r"""The distance of the features of a position, as a root mean square over positions.

    .. math:: L = \sqrt{\frac{1}{B H W} \sum_{b, i} \sum_c (s_{bci} - t_{bci})^2}

    0 for equal inputs, where the gradient is 0 as well.

    Args:
        student: (B, C, H, W), adapted.
        teacher: The same shape; no gradient flows into it.

    Returns:
        A scalar.
    """
    positions = student.numel() // student.shape[1]
    return torch.linalg.vector_norm(student - teacher.detach()) / math.sqrt(positions)


def orthogonal_penalty(weight: torch.Tensor) -> torch.Tensor:
    r"""How far a linear map is from an orthogonal one.

    .. math:: L = \lVert W W^\top - I \rVert_F + \lVert W^\top W - I \rVert_F

    Of a matrix that is not square it is at least the root of the difference of its sides.

    Args:
        weight: W, (D, C).

    Returns:
        A scalar.
    """
    grams = weight @ weight.mT, weight.mT @ weight
    return sum(torch.linalg.vector_norm(gram - torch.eye(len(gram), device=gram.device)) for gram in grams)


@DISTILLERS.register_module()
class TOFD(Distiller):
    r"""The maps that decode and auxiliary heads classify, by orthogonal adapters; ``docs/methods/tofd.md``.

    ============================== ================================================================================
    loss_feature                   ``feature_weight`` times the sum over heads of :func:`feature_distance`
    loss_orthogonal                ``orthogonal_weight`` times that of :func:`orthogonal_penalty` of the adapters
    ============================== ================================================================================

    Each pair of heads has a 1x1 convolution without bias. Both networks need as many auxiliary heads; their task losses are
    the student's own. The method's distillation of logits is an entry of :class:`mmkd.distillers.KD` for each head. No ground
    truth.

    Args:
        layer: The student's layers. Default None: what its decode head and each of its auxiliary heads classify.
        feature_weight: A number or a schedule. Default 0.5.
        orthogonal_weight: A number or a schedule. Default 0.03.
        teacher_layer: The teacher's layers, as many. Default None: as the student's are found, or called.

    Raises:
        ConfigError: for a network without auxiliary heads, where layers are not named, and for other numbers of heads.

    Example:
        >>> distillers = dict(
        ...     tofd=dict(type='TOFD'),
        ...     kd=dict(type='KD'),
        ...     auxiliary=dict(type='KD', layer='auxiliary_head.conv_seg'))
    """

    any_scale = True

    def __init__(
        self,
        layer: str | Sequence[str] | None = None,
        feature_weight: float | Mapping = 0.5,
        orthogonal_weight: float | Mapping = 0.03,
        teacher_layer: str | Sequence[str] | None = None,
    ):
        super().__init__()
        own = functools.partial(_classified, 'student') if layer is None else layer
        others = functools.partial(_classified, 'teacher') if layer is None else layer
        self.levels = LevelPairs(
            own, others if teacher_layer is None else teacher_layer, dict(type='ConvAdapter', bias=False)
        )
        self.feature_weight = Weight(feature_weight, 'feature_weight')
        self.orthogonal_weight = Weight(orthogonal_weight, 'orthogonal_weight')

    def prepare(self, student: nn.Module, teacher: nn.Module) -> None:
        self.levels.prepare(student, teacher)
        self.student_layers, self.teacher_layers = self.levels.student_layers, self.levels.teacher_layers

    def setup(self, student: Taps, teacher: Taps) -> None:
        self.levels.setup(student, teacher)

    def forward(self, student: Taps, teacher: Taps, data_samples: list | None) -> dict[str, torch.Tensor]:
        distances = [feature_distance(pair.student, pair.teacher) for pair in self.levels(student, teacher)]
        penalties = [orthogonal_penalty(each.conv.weight.flatten(1)) for each in self.levels.adapters]
        return {
            'loss_feature': self.feature_weight() * sum(distances),
            'loss_orthogonal': self.orthogonal_weight() * sum(penalties),
        }


def _classified(whose: str, model: nn.Module) -> tuple[str, ...]:
    decode = feature_layer(model)
    auxiliary = auxiliary_feature_layers(model)
    if not auxiliary:
        raise ConfigError(
            f'the {whose}, {type(model).__name__}, has no auxiliary_head, whose task TOFD learns by; give it one, as the '
            f"teacher's training had, or name the layers to compare"
        )
    return decode, *auxiliary
