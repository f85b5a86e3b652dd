"""Double similarity distillation (DSD).

Feng et al., "Double Similarity Distillation for Semantic Image Segmentation", IEEE Transactions on Image Processing 2021.
"""

import itertools
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from mmkd.distillers.base import Distiller
from mmkd.distillers.generic.at import attention_map
from mmkd.distillers.levels import LevelPairs
from mmkd.distillers.schedule import Weight
from mmkd.errors import ConfigError
from mmkd.hosts.segmentation import heads
from mmkd.hosts.segmentation.logits import require_class_logits
from mmkd.registry import DISTILLERS
from mmkd.taps import Taps
from mmkd.values import check_temperature

EPS = 1e-6
"""The least length of a residual that becomes 1."""


def pixel_similarity_loss(student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor]) -> torch.Tensor:
    r"""How differently attention changes from one layer to another.

    .. math::
        L = \frac{1}{P} \sum_{m < n} \frac{1}{B A} \sum_b \lVert r^S_{bmn} - r^T_{bmn} \rVert^2, \qquad
        r_{mn} = \frac{q_m - q_n}{\lVert q_m - q_n \rVert}, \qquad q_m = \frac{v_m}{\lVert v_m \rVert}

    v_m is layer m's attention map as a vector of its A positions, P the number of pairs of layers. Zero for equal inputs.

    Args:
        student: An attention map for each layer, (B, 1, H, W) of one size, at least two.
        teacher: The same shapes; no gradient flows into them.

    Returns:
        A scalar.
    """

    def residuals(maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        scaled = [F.normalize(each.flatten(1)) for each in maps]
        return [F.normalize(a - b, eps=EPS) for a, b in itertools.combinations(scaled, 2)]

    pairs = list(zip(residuals(student), residuals([each.detach() for each in teacher]), strict=True))
    return sum(F.mse_loss(s, t) for s, t in pairs) / len(pairs)


def category_similarity_loss(student: torch.Tensor, teacher: torch.Tensor, tau: float = 4.0) -> torch.Tensor:
    r"""How differently classes overlap.

    .. math::
        L = \frac{1}{B K^2} \sum_b \lVert P^S_b P_b^{S \top} - P^T_b P_b^{T \top} \rVert^2, \qquad
        P_{bka} = \operatorname{softmax}_a(\bar z_{bka} / \tau)

    z̄ are the logits, means of 2x2 positions. The products are about 1 / A for A positions, so that the loss falls with the
    square of the map's size. Zero for equal inputs.

    Args:
        student: z, (B, K, H, W) logits.
        teacher: The same shape; no gradient flows into it.
        tau: Temperature.

    Returns:
        A scalar.
    """

    def overlap(logits: torch.Tensor) -> torch.Tensor:
        each = (F.avg_pool2d(logits, 2, ceil_mode=True).flatten(2) / tau).softmax(2)
        return each @ each.mT

    return F.mse_loss(overlap(student), overlap(teacher.detach()))


@DISTILLERS.register_module()
class DSD(Distiller):
    """Changes of attention between layers, and overlaps of classes; ``docs/methods/dsd.md``.

    ============= =====================================================================================================
    loss_pixel    ``pixel_weight`` times :func:`pixel_similarity_loss` of the auxiliary head's logits, the feature before
                  the classifier and the logits
    loss_category ``category_weight`` times :func:`category_similarity_loss` of the logits
    ============= =====================================================================================================

    Numbers of channels may differ but for the logits'. Nothing is trained beside the student, and no ground truth is
    needed. Where maps differ in size the student's are resized (bilinear) to the teacher's.

    Args:
        layer: The student's layer that puts out class logits. Default: its decode head's.
        feature_layer: Its layer before the classifier. Default: found by its decode head, see
            :func:`mmkd.hosts.segmentation.heads.feature_layer`.
        auxiliary_layer: The auxiliary head's logits, or any other layer of the same stride. Default: its auxiliary head's.
        pixel_weight: A number or a schedule, as the next. Default 1000.
        category_weight: Default 10.
        tau: Temperature of the classes' softmax over positions, positive. Default 4.
        teacher_layer: The teacher's logits, where the name differs from ``layer``. Default, without either: as ``layer``.
        teacher_feature_layer: The same of its feature.
        teacher_auxiliary_layer: The same of its auxiliary logits.

    Raises:
        ConfigError: for logits of other classes, a model without an auxiliary head, or maps of a network that differ in size.

    Example:
        >>> distillers = dict(kd=dict(type='KD'), dsd=dict(type='DSD'))
    """

    def __init__(
        self,
        layer: str | None = None,
        feature_layer: str | None = None,
        auxiliary_layer: str | None = None,
        pixel_weight: float | Mapping = 1000.0,
        category_weight: float | Mapping = 10.0,
        tau: float = 4.0,
        teacher_layer: str | None = None,
        teacher_feature_layer: str | None = None,
        teacher_auxiliary_layer: str | None = None,
    ):
        super().__init__()
        own = [
            auxiliary_layer or heads.auxiliary_layer,
            feature_layer or heads.feature_layer,
            layer or heads.logits_layer,
        ]
        named = (teacher_auxiliary_layer, teacher_feature_layer, teacher_layer)
        others = [name or each for name, each in zip(named, own)]
        self.attention = LevelPairs(own, others, same_channels=False, reduce=attention_map)
        self.logits = LevelPairs(own[-1], others[-1])
        check_temperature(tau)
        self.pixel_weight, self.category_weight = (
            Weight(pixel_weight, 'pixel_weight'),
            Weight(category_weight, 'category_weight'),
        )
        self.tau = tau

    def prepare(self, student: nn.Module, teacher: nn.Module) -> None:
        for each in (self.attention, self.logits):
            each.prepare(student, teacher)
        self.student_layers, self.teacher_layers = self.attention.student_layers, self.attention.teacher_layers

    def setup(self, student: Taps, teacher: Taps) -> None:
        require_class_logits(student, self.student_layers[-1], teacher, self.teacher_layers[-1])
        for each in (self.attention, self.logits):
            each.setup(student, teacher)
        whose = (('student', self.student_layers), ('teacher', self.teacher_layers))
        for (name, layers), maps in zip(whose, self.attention.unadapted(student, teacher), strict=True):
            sizes = [tuple(each.shape[2:]) for each in maps]
            if len(sizes) != 3 or len(set(sizes)) > 1:
                raise ConfigError(
                    f'{name} layers {", ".join(layers)} put out maps of {sizes} positions; name three that put out one map each, '
                    f'of one size'
                )

    def forward(self, student: Taps, teacher: Taps, data_samples: list | None) -> dict[str, torch.Tensor]:
        pairs = self.attention(student, teacher)
        ((s, t, *_),) = self.logits(student, teacher)
        pixel = pixel_similarity_loss([pair.student for pair in pairs], [pair.teacher for pair in pairs])
        return {
            'loss_pixel': self.pixel_weight() * pixel,
            'loss_category': self.category_weight() * category_similarity_loss(s, t, self.tau),
        }
