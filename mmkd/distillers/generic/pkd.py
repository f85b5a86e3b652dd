"""Distillation by the Pearson correlation coefficient (PKD).

Cao et al., "PKD: General Distillation Framework for Object Detectors via Pearson Correlation Coefficient", NeurIPS 2022,
arXiv 2207.02039.
"""

from collections.abc import Mapping, Sequence

import torch

from mmkd.distillers.base import FeatureDistiller
from mmkd.errors import ConfigError
from mmkd.registry import DISTILLERS
from mmkd.values import is_number


def standardize(feature: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    r"""Each channel with mean 0 and standard deviation 1 over all images and positions.

    .. math:: \tilde x_{bci} = \frac{x_{bci} - \mu_c}{\sigma_c + \epsilon}

    with the unbiased :math:`\sigma_c`. A channel that is constant, up to the rounding of its mean, is 0 everywhere and
    has the gradient 0: there the root has none, and rounding would be amplified by 1 / eps.

    Args:
        feature: (B, C, H, W).
        eps: Added to the standard deviation.

    Returns:
        The same shape.
    """
    unbiased = int(feature.numel() > feature.shape[1])  # the variance of a single value is 0
    variance, mean = torch.var_mean(feature, dim=(0, 2, 3), correction=unbiased, keepdim=True)
    with torch.no_grad():
        constant = variance <= (8 * torch.finfo(feature.dtype).eps * mean).square()  # False for NaN, which stays one
    deviation = torch.where(constant, 1.0, variance).sqrt()
    return torch.where(constant, 0.0, (feature - mean) / (deviation + eps))


def pearson_loss(student: torch.Tensor, teacher: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    r"""Half the mean square of the difference of the standardized features.

    .. math:: L = \frac{1}{2} \cdot \frac{1}{B C H W} \sum_{b, c, i} (\tilde s_{bci} - \tilde t_{bci})^2 \approx
        \frac{1}{C} \sum_c (1 - r_c)

    with r the Pearson correlation coefficient of a channel of both; equal but for eps and the factor (n - 1) / n of
    the unbiased deviation, n = B*H*W. Zero for equal inputs; unchanged when a channel of either is scaled by a positive
    number or gets a constant added. See :func:`standardize`.

    Args:
        student: (B, C, H, W).
        teacher: The same shape; no gradient flows into it.
        eps: Added to the standard deviations.

    Returns:
        A scalar.
    """
    return 0.5 * (standardize(student, eps) - standardize(teacher.detach(), eps)).square().mean()


@DISTILLERS.register_module()
class PKD(FeatureDistiller):
    """Correlates each channel of both networks; ``docs/methods/pkd.md``.

    ``loss = loss_weight * sum over levels of pearson_loss``, see :func:`pearson_loss`. It needs no ground truth, and as
    it ignores the scale of features it works across families of detectors. The statistics are those of the images of
    one process. A student's level of another size is resized to the teacher's (bilinear) before they are taken.

    Args:
        layer: The student's layer, or a list.
        loss_weight: A number or a schedule. Default 10, for one-stage teachers; 6 for two-stage ones.
        eps: Added to the standard deviations. Default 1e-6.
        teacher_layer: The teacher's layer, where its name differs.
        adapter: ``'auto'`` (1x1 convolution exactly where channels differ), None or a dict.
        match: ``'stride'`` or ``'index'``: which levels belong together, see
            :class:`mmkd.distillers.levels.LevelPairs`.

    Example:
        >>> distillers = dict(pkd=dict(type='PKD', layer='neck'))
    """

    def __init__(
        self,
        layer: str | Sequence[str],
        loss_weight: float | Mapping = 10.0,
        eps: float = 1e-6,
        teacher_layer: str | Sequence[str] | None = None,
        adapter: str | Mapping | None = 'auto',
        match: str = 'stride',
    ):
        super().__init__(layer, loss_weight, teacher_layer, adapter, match)
        if not (is_number(eps) and eps >= 0):
            raise ConfigError(f'eps={eps!r}: expected a number of at least 0')
        self.eps = eps

    def compare(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return pearson_loss(student, teacher, self.eps)
