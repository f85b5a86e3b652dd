"""Region-aware mutual relational knowledge distillation (RMRKD).

Zheng, Lin, Liang, Zhou, Liang, "Region-aware mutual relational knowledge distillation for semantic segmentation", Pattern
Recognition 161, 2025.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from mmkd.distillers.base import FeatureDistiller
from mmkd.distillers.generic.kd import pixel_divergence
from mmkd.errors import ConfigError
from mmkd.hosts.segmentation.labels import class_masks
from mmkd.registry import DISTILLERS
from mmkd.taps import Taps
from mmkd.values import check_temperature

ABSENT = -1e9
"""The logit of a position outside a region: its probability is 0, and what the divergence makes of it is finite."""


def mutual_relation_loss(
    student: torch.Tensor, teacher: torch.Tensor, masks: torch.Tensor, tau: float = 0.1
) -> torch.Tensor:
    r"""How positions relate to the centres of classes, of both networks, within a class and outside it.

    With v the mean feature of class k in an image, f_a that of a position, and R the positions of the class (inside) or
    those of all other classes (outside),

    .. math::
        L = \frac{\tau^2}{4 B} \sum_{b, k} \sum_R \Big( \operatorname{KL}\big( \sigma(v^S, f^T) \Vert \sigma(v^S, f^S) \big)
        + \operatorname{KL}\big( \sigma(v^T, f^T) \Vert \sigma(v^T, f^S) \big) \Big), \qquad
        \sigma(v, f)_a = \operatorname{softmax}_{a \in R}(\cos(v, f_a) / \tau)

    The sum is over the classes that an image has. Targets, the first of each pair, are constants; the gradient flows
    through the student's features and its centres. Zero for equal inputs.

    Args:
        student: f^S, (B, C, H, W), adapted.
        teacher: The same shape; no gradient flows into it.
        masks: (B, K, H, W) bool, the positions of each class; ignored ones belong to none.
        tau: Temperature.

    Returns:
        A scalar; 0 where everything is ignored.
    """
    inside = masks.flatten(2)
    outside = inside.any(1, keepdim=True) & ~inside & inside.any(2, keepdim=True)
    features = {'s': student.flatten(2), 't': teacher.detach().flatten(2)}
    part = inside.to(student.dtype)
    centres = {key: F.normalize(torch.einsum('bka,bca->bkc', part, each), dim=2) for key, each in features.items()}
    features = {key: F.normalize(each, dim=1) for key, each in features.items()}

    def relations(centre: str, feature: str, region: torch.Tensor) -> torch.Tensor:
        """(B * K, positions)."""
        return (centres[centre] @ features[feature]).masked_fill(~region, ABSENT).flatten(0, 1)

    return sum(
        pixel_divergence(relations(centre, 's', region), relations(centre, 't', region), tau, 'sum')
        for centre in 'st'
        for region in (inside, outside)
    ) / (4 * len(student))


@DISTILLERS.register_module()
class RMRKD(FeatureDistiller):
    """Relations of positions to the centres of classes, those of both networks; ``docs/methods/rmrkd.md``.

    ``loss = loss_weight * mutual_relation_loss``, see :func:`mutual_relation_loss`, summed over layers. Classes are those of
    the student's decode head. The student's feature is adapted to the teacher's channels, as positions are compared with the
    other network's centres. The published recipe has MGD beside it.

    Args:
        layer: The student's layer, or a list, such as the last stage of its backbone.
        loss_weight: A number or a schedule. Default 6.4, of maps of 64 columns and the last stage.
        tau: Temperature, positive. Default 0.1.
        teacher_layer: The teacher's layer, where its name differs.
        adapter: ``'auto'`` (1x1 convolution exactly where channels differ), None or a dict.
        match: ``'stride'`` or ``'index'``: which levels belong together, see
            :class:`mmkd.distillers.levels.LevelPairs`.

    Raises:
        ConfigError: for a detector.

    Example:
        >>> distillers = dict(rmrkd=dict(type='RMRKD', layer='backbone.layer4'))
    """

    def __init__(
        self,
        layer: str | Sequence[str],
        loss_weight: float | Mapping = 6.4,
        tau: float = 0.1,
        teacher_layer: str | Sequence[str] | None = None,
        adapter: str | Mapping | None = 'auto',
        match: str = 'stride',
    ):
        super().__init__(layer, loss_weight, teacher_layer, adapter, match)
        check_temperature(tau)
        self.tau = tau

    def prepare(self, student: nn.Module, teacher: nn.Module) -> None:
        if not hasattr(student, 'decode_head'):
            raise ConfigError(
                f'{type(student).__name__} is no segmentor, and RMRKD takes the class of each pixel; use MGD for a detector'
            )
        super().prepare(student, teacher)

    def forward(self, student: Taps, teacher: Taps, data_samples: list | None) -> dict[str, torch.Tensor]:
        losses = [
            mutual_relation_loss(s, t, class_masks(student.model, data_samples, s.shape[2:]), self.tau)
            for s, t, *_ in self.levels(student, teacher)
        ]
        return {'loss': self.loss_weight() * sum(losses)}
