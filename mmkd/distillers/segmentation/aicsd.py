"""Adaptive inter-class similarity distillation (AICSD).

Mansourian, Ahmadi, Kasaei, "AICSD: Adaptive Inter-Class Similarity Distillation for Semantic Segmentation", 2023, arXiv
2308.04243.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from mmkd.distillers.base import Distiller
from mmkd.distillers.levels import LevelPairs
from mmkd.distillers.schedule import Weight
from mmkd.hosts.segmentation.heads import logits_layer
from mmkd.hosts.segmentation.logits import compared_logits, require_class_logits
from mmkd.registry import DISTILLERS
from mmkd.taps import Taps
from mmkd.values import check_temperature

EPS = 1e-4
"""The least length of a row of divergences that becomes 1."""


def class_similarity(logits: torch.Tensor, tau: float = 1.0) -> torch.Tensor:
    r"""How far each class is from each other one, by where the two are.

    .. math::
        M_{bij} = \frac{D_{bij}}{\max(\lVert D_{bi \cdot} \rVert, \epsilon)}, \qquad
        D_{bij} = \operatorname{KL}(p_{bi} \,\Vert\, p_{bj}), \qquad
        p_{bka} = \operatorname{softmax}_a(z_{bka} / \tau)

    with a over the H*W positions and epsilon 1e-4. Unchanged by a constant added to a class.

    Args:
        logits: z, (B, K, H, W).
        tau: Temperature.

    Returns:
        (B, K, K), rows of length 1, the diagonal 0.
    """
    log = F.log_softmax(logits.flatten(2) / tau, dim=2)
    each = log.exp()
    divergence = (each * log).sum(2, keepdim=True) - each @ log.mT
    return F.normalize(divergence.clamp(min=0), dim=2, eps=EPS)


def inter_class_loss(student: torch.Tensor, teacher: torch.Tensor, tau: float = 1.0) -> torch.Tensor:
    r"""Mean squared difference of both networks' :func:`class_similarity`, over images and pairs of classes.

    Zero for equal inputs.

    Args:
        student: (B, K, H, W) logits.
        teacher: (B, K, H', W'); no gradient flows into it.
        tau: Temperature.

    Returns:
        A scalar.
    """
    return F.mse_loss(class_similarity(student, tau), class_similarity(teacher.detach(), tau))


@DISTILLERS.register_module()
class AICSD(Distiller):
    """Similarities of classes by where they are; ``docs/methods/aicsd.md``.

    ``loss = loss_weight * inter_class_loss``, see :func:`inter_class_loss`, between the class logits of both networks, summed
    over layers. All positions count, ignored ones too. No ground truth, and nothing is trained beside the student. The
    published recipe has soft targets beside it and lets both fade: ``loss_weight=dict(type='linear', start=10.0,
    value=0.0, end=80000)``.

    Args:
        layer: The student's layer that puts out class logits, or a list. Default: its decode head's.
        loss_weight: A number or a schedule. Default 10.
        tau: Temperature, positive. Default 1.
        teacher_layer: The teacher's layer, where its name differs from ``layer``. Default, without either: as ``layer``.

    Raises:
        ConfigError: for layers that do not put out logits of the same classes.

    Example:
        >>> distillers = dict(kd=dict(type='KD'), aicsd=dict(type='AICSD'))
    """

    def __init__(
        self,
        layer: str | Sequence[str] | None = None,
        loss_weight: float | Mapping = 10.0,
        tau: float = 1.0,
        teacher_layer: str | Sequence[str] | None = None,
    ):
        super().__init__()
        self.levels = LevelPairs(layer or logits_layer, teacher_layer)
        check_temperature(tau)
        self.loss_weight = Weight(loss_weight, 'loss_weight')
        self.tau = tau

    def prepare(self, student: nn.Module, teacher: nn.Module) -> None:
        self.levels.prepare(student, teacher)
        self.student_layers, self.teacher_layers = self.levels.student_layers, self.levels.teacher_layers

    def setup(self, student: Taps, teacher: Taps) -> None:
        for layer, other in zip(self.student_layers, self.teacher_layers):
            require_class_logits(student, layer, teacher, other)
        self.levels.setup(student, teacher)

    def forward(self, student: Taps, teacher: Taps, data_samples: list | None) -> dict[str, torch.Tensor]:
        losses = [inter_class_loss(s, t, self.tau) for s, t in compared_logits(self.levels, student, teacher)]
        return {'loss': self.loss_weight() * sum(losses)}
