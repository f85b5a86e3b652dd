"""Distillation in the frequency domain with semantic prompts (FreeKD).

Zhang, Huang, Liu, Jiang, Cheng, Zhang, "FreeKD: Knowledge Distillation via Semantic Frequency Prompt", CVPR 2024,
arXiv 2311.12079.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from mmkd.distillers.tokens import Learnt, LevelTokens, TokenDistiller, overlap, token_masks
from mmkd.registry import DISTILLERS

STEPS = 3
"""How often a map is halved, as in the authors' code."""


def haar(feature: torch.Tensor, steps: int = STEPS) -> tuple[torch.Tensor, list[torch.Tensor]]:
    r"""The Haar wavelet transform of a map.

    Of each 2x2 positions a, b above c, d one step makes

    .. math:: \tfrac{1}{2}(a + b + c + d), \quad \tfrac{1}{2}(a + b - c - d), \quad \tfrac{1}{2}(a - b + c - d), \quad
        \tfrac{1}{2}(a - b - c + d),

    the low band, of which the next step is taken, and three details. An odd last row or column is followed by one of 0.

    Args:
        feature: (B, C, H, W).
        steps: How many.

    Returns:
        The last low band, (B, C, h, w), and of each step, finest first, the details, (B, C, 3, h, w).
    """
    details = []
    for _ in range(steps):
        feature = F.pad(feature, (0, feature.shape[3] % 2, 0, feature.shape[2] % 2))
        upper, lower = feature[..., ::2, :], feature[..., 1::2, :]
        a, b, c, d = upper[..., ::2], upper[..., 1::2], lower[..., ::2], lower[..., 1::2]
        details.append(torch.stack([a + b - c - d, a - b + c - d, a - b - c + d], 2) / 2)
        feature = (a + b + c + d) / 2
    return feature, details


def inverse_haar(low: torch.Tensor, details: Sequence[torch.Tensor], size: Sequence[int]) -> torch.Tensor:
    """The map of which :func:`haar` made these bands.

    Args:
        low: (B, C, h, w).
        details: Of each step, finest first, (B, C, 3, h, w).
        size: H and W.

    Returns:
        (B, C, H, W).
    """
    for rows, columns, both in (each.unbind(2) for each in reversed(details)):
        low = low[..., : rows.shape[-2], : rows.shape[-1]]
        above = torch.stack([low + rows + columns + both, low + rows - columns - both], -1).flatten(-2)
        below = torch.stack([low - rows + columns - both, low - rows - columns + both], -1).flatten(-2)
        low = torch.stack([above, below], -2).flatten(-3, -2) / 2
    return low[..., : size[0], : size[1]]


def band_loss(
    student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor], masks: Sequence[torch.Tensor]
) -> torch.Tensor:
    r"""The absolute difference of the details behind masks, summed over steps.

    .. math:: L = \sum_j \operatorname{mean}_{b, t, c, o, i} m_{jbti} \, | s_{jbcoi} - t_{jbcoi} |

    Args:
        student: Of each step (B, C, 3, h, w), adapted.
        teacher: The same shapes; no gradient flows into it.
        masks: Of each step (B, T, h, w).

    Returns:
        A scalar, 0 for equal details.
    """
    levels = [
        ((s - t.detach()).abs().mean((1, 2)) * m.mean(1)).mean()
        for s, t, m in zip(student, teacher, masks, strict=True)
    ]
    return torch.stack(levels).sum()


class FrequencyPrompts(LevelTokens):
    """Tokens of one level: for the low band, and for the details of each step.

    Args:
        channels: C, of the teacher's feature.
        tokens: T, of each.
    """

    def __init__(self, channels: int, tokens: int):
        super().__init__()
        self.tokens = Learnt(0.01 * torch.randn(1 + STEPS, tokens, channels))

    @staticmethod
    def _masks(tokens: torch.Tensor, details: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """A step's masks are of the sum of its three details."""
        return [token_masks(own, each.sum(2)) for own, each in zip(tokens, details, strict=True)]

    def mask(self, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        low, details = haar(teacher)
        of_low, of_details = self.tokens.value[0], self.tokens.value[1:]
        masks = [token_masks(of_low, low), *self._masks(of_details, details)]
        shown = [each.sum(1) for each in masks]
        details = [each * m[:, None, None] for each, m in zip(details, shown[1:], strict=True)]
        made = inverse_haar(low * shown[0][:, None], details, teacher.shape[2:])
        return made, torch.stack([overlap(each) for each in masks]).sum()

    def compare(self, student: torch.Tensor, teacher: torch.Tensor, step: int) -> torch.Tensor:
        (_, own), (_, others) = haar(student), haar(teacher)
        return band_loss(own, others, self._masks(self.tokens.kept[1:], others))


@DISTILLERS.register_module()
class FreeKD(TokenDistiller):
    """The details of the student's features become the teacher's where learnt masks show them; ``docs/methods/freekd.md``.

    Features are compared band by band, as :func:`haar` makes them of each level. Tokens, ``tokens`` for the low band and
    for each of the three steps, are learnt on the frozen teacher in the first ``token_steps`` steps by ``loss_token``, see
    :class:`mmkd.distillers.tokens.TokenDistiller`. The student learns from the labels alone meanwhile. From then on
    ``loss = loss_weight * sum over levels of band_loss``, see :func:`band_loss`: of the details, with the masks of the teacher's
    own. The low band is not compared; the authors have a squared error of the whole features beside it, ``FitNet``.

    Args:
        layer: The student's layer. Default: ``'neck'``.
        loss_weight: Of ``loss``, a number or a schedule. Default 1.
        tokens: How many masks there are of each band, at least 2. Default 6.
        token_steps: How many steps the tokens learn. Default 2000.
        teacher_layer: The teacher's layer, where its name differs.
        adapter: ``'auto'`` (1x1 convolution exactly where channels differ), None or a dict.

    Raises:
        ConfigError: for a teacher whose own loss cannot be taken of that layer, or whose classes are others.

    Example:
        >>> distillers = dict(freekd=dict(type='FreeKD'), mse=dict(type='FitNet', layer='neck', loss_weight=5.0))
    """

    def __init__(
        self,
        layer: str | None = None,
        loss_weight: float | Mapping = 1.0,
        tokens: int = 6,
        token_steps: int = 2000,
        teacher_layer: str | None = None,
        adapter: str | Mapping | None = 'auto',
    ):
        super().__init__(layer, loss_weight, tokens, token_steps, teacher_layer, adapter)

    def level_tokens(self, channels: int, teacher: nn.Module) -> LevelTokens:
        return FrequencyPrompts(channels, self.number)
