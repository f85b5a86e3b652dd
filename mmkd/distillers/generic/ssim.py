"""Structural knowledge distillation (SSIM).

de Rijk, Schneider, Cordts, Gavrila, "Structural Knowledge Distillation for Object Detection", NeurIPS 2022, arXiv 2211.13133.
"""

from collections.abc import Mapping, Sequence

import torch

from mmkd.distillers.base import FeatureDistiller
from mmkd.registry import DISTILLERS
from mmkd.taps import Taps

K1, K2 = 0.01, 0.03


def unit_range(feature: torch.Tensor) -> torch.Tensor:
    r"""Each image's map stretched to 0 to 1, over all channels and positions.

    .. math:: \hat x_{bci} = \frac{x_{bci} - \min_b}{\max_b - \min_b}

    A map that is constant, up to rounding, is 0 everywhere and has the gradient 0.

    Args:
        feature: (B, C, H, W).

    Returns:
        The same shape.
    """
    low, high = (each[:, None, None, None] for each in feature.flatten(1).aminmax(dim=1))
    kind = torch.finfo(feature.dtype)
    with torch.no_grad():  # False for what is not finite, which does not become so
        constant = high - low < 8 * kind.eps * torch.maximum(high.abs(), low.abs()) + kind.tiny
    return torch.where(constant, 0.0, (feature - low) / torch.where(constant, 1.0, high - low))


def window_weights(positions: int, like: torch.Tensor, window: int = 11, sigma: float = 1.5) -> torch.Tensor:
    """How much each position of a row counts in the Gaussian window around each other one.

    At the border a window has the part of it that lies on the row.

    Args:
        positions: The length of the row.
        like: For the device and the kind of numbers.
        window: Its length, odd.
        sigma: Standard deviation, in positions.

    Returns:
        (positions, positions), which sum to 1 in each row.
    """
    position = torch.arange(positions, device=like.device, dtype=like.dtype)
    distance = position[:, None] - position
    weights = torch.exp(-0.5 * (distance / sigma) ** 2) * (distance.abs() <= window // 2)
    return weights / weights.sum(1, keepdim=True)


def structural_similarity(
    student: torch.Tensor, teacher: torch.Tensor, window: int = 11, sigma: float = 1.5
) -> torch.Tensor:
    r"""How alike two maps of the range 0 to 1 are around each position, in level, contrast and structure.

    .. math::
        \operatorname{SSIM} = \frac{(2 \mu_s \mu_t + C_1)(2 \sigma_{st} + C_2)}{(\mu_s^2 + \mu_t^2 + C_1)(\sigma_s^2 +
        \sigma_t^2 + C_2)}, \qquad C_1 = 0.01^2, \quad C_2 = 0.03^2

    with the means, variances and the covariance of a Gaussian window around the position, each channel by itself.

    Args:
        student: (B, C, H, W).
        teacher: The same shape; no gradient flows into it.
        window: Positions along each side of the window, odd.
        sigma: The window's standard deviation, in positions.

    Returns:
        (B, C, H, W), from -1 to 1; 1 where both are equal.
    """
    teacher = teacher.detach()
    rows, columns = (window_weights(size, student, window, sigma) for size in student.shape[2:])

    def around(feature: torch.Tensor) -> torch.Tensor:
        # products of matrices: a convolution may run in TF32, which is too coarse for a difference of squares
        return rows @ (feature @ columns.mT)

    s_mean, t_mean = around(student), around(teacher)
    level = s_mean.square() + t_mean.square()
    contrast = around(student.square()) + around(teacher.square()) - level
    structure = 2 * (around(student * teacher) - s_mean * t_mean)
    c1, c2 = K1**2, K2**2
    return (2 * s_mean * t_mean + c1) * (structure + c2) / ((level + c1) * (contrast + c2))


def structural_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    r"""Half of what the two maps lack to be alike, on average over channels and positions.

    .. math:: L = \frac{1}{B C H W} \sum_{b, c, i} \frac{1 - \operatorname{SSIM}(\hat s, \hat t)_{bci}}{2}

    with :func:`unit_range` of both and their :func:`structural_similarity`. Zero for equal inputs, at most 1; unchanged when
    all of an image's map is scaled by a positive number or gets a constant added.

    Args:
        student: (B, C, H, W).
        teacher: The same shape; no gradient flows into it.

    Returns:
        A scalar.
    """
    return 0.5 * (1 - structural_similarity(unit_range(student), unit_range(teacher.detach()))).mean()


@DISTILLERS.register_module()
class SSIM(FeatureDistiller):
    """Compares levels, contrasts and structures around each position of both networks' maps; ``docs/methods/ssim.md``.

    ``loss = loss_weight * sum over levels of structural_loss``, see :func:`structural_loss`. It needs no ground truth.

    Args:
        layer: The student's layer, or a list.
        loss_weight: lambda in the paper, a number or a schedule. Default 4.
        teacher_layer: The teacher's layer, where its name differs.
        adapter: ``'auto'`` (1x1 convolution exactly where channels differ), None or a dict.
        match: ``'stride'`` or ``'index'``: which levels belong together, see
            :class:`mmkd.distillers.levels.LevelPairs`.

    Example:
        >>> distillers = dict(ssim=dict(type='SSIM', layer='neck'))
    """

    def __init__(
        self,
        layer: str | Sequence[str],
        loss_weight: float | Mapping = 4.0,
        teacher_layer: str | Sequence[str] | None = None,
        adapter: str | Mapping | None = 'auto',
        match: str = 'stride',
    ):
        super().__init__(layer, loss_weight, teacher_layer, adapter, match)

    def pictures(self, student: Taps, teacher: Taps, data_samples: list | None) -> dict[str, torch.Tensor]:
        return {
            f'similarity, level {pair.student_level}': structural_similarity(
                unit_range(pair.student), unit_range(pair.teacher)
            ).mean(1)
            for pair in self.levels(student, teacher)
        }

    def compare(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return structural_loss(student, teacher)
