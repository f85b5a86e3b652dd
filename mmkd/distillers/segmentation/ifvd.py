"""Intra-class feature variation distillation (IFVD).

Wang, Zhou, Jiang, Bai, Xu, "Intra-class Feature Variation Distillation for Semantic Segmentation", ECCV 2020.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F

from mmkd.distillers.base import FeatureDistiller
from mmkd.errors import ConfigError
from mmkd.hosts.segmentation.heads import feature_layer
from mmkd.hosts.segmentation.labels import class_masks
from mmkd.registry import DISTILLERS
from mmkd.taps import Taps


def prototype_similarity(feature: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    r"""How much the feature of each position is like the mean of its class in the same image.

    .. math::
        s_a = \cos(f_a, \mu_{y_a}), \qquad \mu_k = \frac{1}{n_k} \sum_{a: y_a = k} f_a

    Gradients flow through the means too.

    Args:
        feature: f, (B, C, H, W).
        masks: (B, K, H, W) bool, the positions of each class; a position belongs to one class or to none.

    Returns:
        (B, H*W); 0 for positions of no class.
    """
    masks = masks.flatten(2).to(feature.dtype)
    feature = feature.flatten(2)
    sums = torch.einsum('bka,bca->bkc', masks, feature)  # in the direction of the means
    cosines = torch.einsum('bkc,bca->bka', F.normalize(sums, dim=2), F.normalize(feature, dim=1))
    return (cosines * masks).sum(1)


def intra_class_variation_loss(
    student: torch.Tensor, teacher: torch.Tensor, masks: torch.Tensor, count_ignored: bool = False
) -> torch.Tensor:
    r"""Mean square of the difference between the two networks' similarities of each position to its class.

    .. math:: L = \frac{1}{n} \sum_{b, a: y_{ba} \neq \text{ignored}} (s^S_{ba} - s^T_{ba})^2

    s as :func:`prototype_similarity`, n the number of positions that are not ignored. Zero for equal inputs; unchanged
    when the features of either network are scaled or rotated.

    Args:
        student: (B, C, H, W), any number of channels.
        teacher: (B, C', H, W); no gradient flows into it.
        masks: (B, K, H, W) bool, the positions of each class; ignored ones belong to none.
        count_ignored: Whether n is B*H*W.

    Returns:
        A scalar; 0 where everything is ignored.
    """
    difference = prototype_similarity(student, masks) - prototype_similarity(teacher.detach(), masks)
    count = difference.numel() if count_ignored else masks.sum().clamp(min=1)
    return difference.square().sum() / count


@DISTILLERS.register_module()
class IFVD(FeatureDistiller):
    """Lets features vary around the mean of their class as the teacher's do; ``docs/methods/ifvd.md``.

    ``loss = loss_weight * intra_class_variation_loss``, see :func:`intra_class_variation_loss`, summed over layers.
    Classes are those of the student's decode head. The numbers of channels may differ, so there is no adapter. Where
    sizes differ the student's map is resized (bilinear) to the teacher's. The published recipes have soft targets and a
    critic beside it, see ``configs/ifvd_pspnet.py``.

    Args:
        layer: The student's layer before its classifier, or a list. Default: found by its decode head, see
            :func:`mmkd.hosts.segmentation.heads.feature_layer`.
        loss_weight: A number or a schedule. Default 20.
        count_ignored: Whether ignored positions, which contribute 0, count in the mean, as in the authors' code.
            Default False.
        teacher_layer: The teacher's layer, where its name differs from ``layer``. Default, without either: as ``layer``.
        match: ``'stride'`` or ``'index'``: which levels belong together, see
            :class:`mmkd.distillers.levels.LevelPairs`.

    Example:
        >>> distillers = dict(kd=dict(type='KD'), ifvd=dict(type='IFVD'))
    """

    same_channels = False

    def __init__(
        self,
        layer: str | Sequence[str] | None = None,
        loss_weight: float | Mapping = 20.0,
        count_ignored: bool = False,
        teacher_layer: str | Sequence[str] | None = None,
        match: str = 'stride',
    ):
        super().__init__(layer or feature_layer, loss_weight, teacher_layer, match=match)
        if not isinstance(count_ignored, bool):
            raise ConfigError(f'count_ignored={count_ignored!r}: expected True or False')
        self.count_ignored = count_ignored

    def forward(self, student: Taps, teacher: Taps, data_samples: list | None) -> dict[str, torch.Tensor]:
        losses = [
            intra_class_variation_loss(s, t, class_masks(student.model, data_samples, s.shape[2:]), self.count_ignored)
            for s, t, *_ in self.levels(student, teacher)
        ]
        return {'loss': self.loss_weight() * sum(losses)}
