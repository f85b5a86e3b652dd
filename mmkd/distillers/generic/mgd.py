"""Masked generative distillation (MGD).

Yang et al., "Masked Generative Distillation", ECCV 2022, arXiv 2205.01529.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from mmkd.distillers.base import FeatureDistiller
from mmkd.errors import ConfigError
from mmkd.registry import DISTILLERS
from mmkd.taps import Taps
from mmkd.values import is_number


def random_mask(feature: torch.Tensor, ratio: float) -> torch.Tensor:
    """Positions to keep, one draw for all channels.

    Args:
        feature: (B, C, H, W).
        ratio: The probability that a position is 0.

    Returns:
        (B, 1, H, W), of 0 and 1.
    """
    batch, _, height, width = feature.shape
    return (torch.rand(batch, 1, height, width, device=feature.device) >= ratio).to(feature.dtype)


def generation_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    mask: torch.Tensor,
    generator: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    r"""Squared distance of the teacher's feature from what is generated out of the student's masked one.

    .. math:: L = \frac{1}{B} \sum_b \lVert G(s_b \odot M_b) - t_b \rVert_2^2

    A sum over channels and positions: its weight belongs to a size of the map.

    Args:
        student: (B, C, H, W), adapted.
        teacher: The same shape; no gradient flows into it.
        mask: (B, 1, H, W), M.
        generator: G, from the student's shape to the same.

    Returns:
        A scalar.
    """
    return (generator(student * mask) - teacher.detach()).square().sum() / len(student)


@DISTILLERS.register_module()
class MGD(FeatureDistiller):
    """Generates the teacher's feature out of the student's, of which a part is masked; ``docs/methods/mgd.md``.

    ``loss = loss_weight * sum over levels of generation_loss``, see :func:`generation_loss`. The mask is drawn anew in
    each step and for each level. There is one generator per level, which is trained with the student and not needed
    afterwards. No ground truth. The loss is not 0 for equal networks.

    The loss is a sum over channels and positions, so its weight belongs to a size of the map: 4 times as much for images
    of half the height and width. The defaults are for one-stage detectors and images of 800x1333.

    Args:
        layer: The student's layer, or a list.
        mask_ratio: The probability that a position is masked, lambda in the paper. Default 0.65.
        loss_weight: alpha, a number or a schedule. Default 2e-5.
        teacher_layer: The teacher's layer, where its name differs.
        adapter: ``'auto'`` (1x1 convolution exactly where channels differ), None or a dict; before the mask.
        match: ``'stride'`` or ``'index'``: which levels belong together, see
            :class:`mmkd.distillers.levels.LevelPairs`.

    Example:
        >>> distillers = dict(mgd=dict(type='MGD', layer='neck'))
    """

    def __init__(
        self,
        layer: str | Sequence[str],
        mask_ratio: float = 0.65,
        loss_weight: float | Mapping = 2e-5,
        teacher_layer: str | Sequence[str] | None = None,
        adapter: str | Mapping | None = 'auto',
        match: str = 'stride',
    ):
        super().__init__(layer, loss_weight, teacher_layer, adapter, match)
        if not (is_number(mask_ratio) and 0 <= mask_ratio < 1):
            raise ConfigError(f'mask_ratio={mask_ratio!r}: expected a probability of at least 0 and below 1')
        self.mask_ratio = mask_ratio

    def setup(self, student: Taps, teacher: Taps) -> None:
        super().setup(student, teacher)
        _, targets = self.levels.unadapted(student, teacher)
        self.generators = nn.ModuleList(generator(target.shape[1]) for target in targets)

    def forward(self, student: Taps, teacher: Taps, data_samples: list | None) -> dict[str, torch.Tensor]:
        levels = [
            generation_loss(pair.student, pair.teacher, random_mask(pair.student, self.mask_ratio), generate)
            for pair, generate in zip(self.levels(student, teacher), self.generators, strict=True)
        ]
        return {'loss': self.loss_weight() * sum(levels)}


def generator(channels: int) -> nn.Sequential:
    """The network that generates the teacher's feature, (B, channels, H, W) to the same."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1)
    )
