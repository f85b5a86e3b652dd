"""Weighted soft labels (WSLD).

Zhou, Song, Chen, Zhou, Wang, Yuan, Zhang, "Rethinking Soft Labels for Knowledge Distillation: A Bias-Variance Tradeoff
Perspective", ICLR 2021, arXiv 2102.00650, applied to each pixel.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from mmkd.distillers.generic.kd import KD
from mmkd.errors import ConfigError
from mmkd.hosts.class_logits import ClassLogits
from mmkd.registry import DISTILLERS
from mmkd.taps import Taps


@torch.no_grad()
def soft_label_weights(student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    r"""How much is learnt from the teacher at each position: the less, the better the student knows the label already.

    .. math:: w = 1 - \exp \Big( - \frac{\log p^S_y}{\log p^T_y} \Big)

    with the probabilities of the label y, without a temperature. In [0, 1): 0 where the student is sure of the label, 0.63 where
    both are as sure, nearly 1 where the teacher is far surer. 1 for a position without a label, from which is learnt as ever.

    Args:
        student: (P, K, ...), logits.
        teacher: The same shape.
        labels: (P, ...) int64, 0 to K - 1, or -1 for none.

    Returns:
        (P, ...), without gradient.
    """
    index = labels.clamp(min=0)[:, None]
    own, other = (-F.log_softmax(each, 1).gather(1, index)[:, 0] for each in (student, teacher))
    weights = 1 - torch.exp(-own / other.clamp(min=torch.finfo(other.dtype).tiny))
    return weights.where(labels >= 0, 1.0)


@DISTILLERS.register_module()
class WSLD(KD):
    """Soft targets that count less where the student knows the label as well as the teacher, for segmentors.

    :class:`mmkd.distillers.KD` with each pixel's divergence times :func:`soft_label_weights`; what it is divided by counts all
    pixels as before. A class that the teacher does not know counts as no label. Not for detectors, whose slots have no class
    before their loss assigns one. More in ``docs/methods/wsld.md``.

    Args:
        layer: As of KD.
        tau: Temperature, positive. Default 2.
        loss_weight: A number or a schedule. Default 2.5.
        reduction: As of KD.
        label_size: As of KD.
        teacher_layer: As of KD.

    Raises:
        ConfigError: for a detector, and as KD.

    Example:
        >>> distillers = dict(wsld=dict(type='WSLD'))
    """

    renamed = {}

    def __init__(
        self,
        layer: str | Sequence[str] | None = None,
        tau: float = 2.0,
        loss_weight: float | Mapping = 2.5,
        reduction: str = 'pixel_mean',
        label_size: bool = False,
        teacher_layer: str | Sequence[str] | None = None,
    ):
        super().__init__(layer, tau, loss_weight, reduction, label_size, teacher_layer=teacher_layer)

    def prepare(self, student: nn.Module, teacher: nn.Module) -> None:
        if not hasattr(student, 'decode_head'):
            raise ConfigError(
                f'{type(student).__name__} is no segmentor, and WSLD weighs by the label of each pixel; use KD for a detector'
            )
        super().prepare(student, teacher)

    def weigh(self, logits: ClassLogits, student: Taps, data_samples: list | None) -> ClassLogits:
        labels = logits.positions_of(self.reader.labels(logits, student, data_samples))
        return logits._replace(weights=soft_label_weights(logits.student, logits.teacher, labels))
