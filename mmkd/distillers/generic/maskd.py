"""Masked distillation with receptive tokens (MasKD).

Huang, Zhang, You, Wang, Qian, Cao, Xu, "Masked Distillation with Receptive Tokens", ICLR 2023, arXiv 2205.14589.
"""

from collections.abc import Mapping

import torch
from torch import nn

from mmkd.distillers.tokens import Learnt, LevelTokens, TokenDistiller, overlap, token_masks
from mmkd.errors import ConfigError
from mmkd.registry import DISTILLERS
from mmkd.values import is_whole


def masked_loss(
    student: torch.Tensor, teacher: torch.Tensor, masks: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor:
    r"""The squared distance of the features behind each mask, relative to how much the mask shows.

    .. math::
        L = \frac{1}{B} \sum_b \sum_t w_{bt} \frac{\frac{1}{C} \sum_{c,i} m_{bti}^2 (s_{bci} - t_{bci})^2}
        {\sum_i m_{bti} + \epsilon}

    with epsilon 1e-5. Zero for equal features.

    Args:
        student: (B, C, H, W), adapted.
        teacher: The same shape; no gradient flows into it.
        masks: (B, T, H, W), of 0 to 1.
        weights: w, (B, T). Default None: 1 / T.

    Returns:
        A scalar.
    """
    distance = (student - teacher.detach()).square().mean(1)  # (B, H, W)
    behind = torch.einsum('bthw,bhw->bt', masks.square(), distance) / (masks.sum((2, 3)) + 1e-5)
    return behind.mean() if weights is None else (weights * behind).sum(1).mean()


class ReceptiveTokens(LevelTokens):
    """Tokens of one level, each of which shows a region.

    Args:
        channels: C, of the teacher's feature.
        tokens: T.
        weighted: Whether each image weighs them, softmax_t(W mean_i f_i + b), at first alike. Default True.
        both_begin: After how many steps of distillation the student's masks count as well. Default None: they never do.
    """

    def __init__(self, channels: int, tokens: int, weighted: bool = True, both_begin: int | None = None):
        super().__init__()
        self.tokens = Learnt(0.01 * torch.randn(tokens, channels))
        self.weight = Learnt(torch.zeros(tokens, channels)) if weighted else None
        self.bias = Learnt(torch.zeros(tokens)) if weighted else None
        self.both_begin = both_begin

    @staticmethod
    def _weights(feature: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return (feature.mean((2, 3)) @ weight.T + bias).softmax(1)

    def mask(self, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        masks = token_masks(self.tokens.value, teacher)
        if self.weight is None or self.bias is None:
            shown = masks.sum(1)
        else:
            shown = torch.einsum('bt,bthw->bhw', self._weights(teacher, self.weight.value, self.bias.value), masks)
        return teacher * shown[:, None], overlap(masks)

    def compare(self, student: torch.Tensor, teacher: torch.Tensor, step: int) -> torch.Tensor:
        masks = token_masks(self.tokens.kept, teacher)
        if self.both_begin is not None and step >= self.both_begin:
            masks = masks * token_masks(self.tokens.kept, student.detach())
        weighted = self.weight is not None and self.bias is not None
        weights = self._weights(teacher, self.weight.kept, self.bias.kept) if weighted else None
        return masked_loss(student, teacher, masks, weights)


@DISTILLERS.register_module()
class MasKD(TokenDistiller):
    """The student's features become the teacher's where learnt masks show them; ``docs/methods/maskd.md``.

    Tokens, ``tokens`` of each level, are learnt on the frozen teacher in the first ``token_steps`` steps by
    ``loss_token``, see :class:`mmkd.distillers.tokens.TokenDistiller`. The student learns from the labels alone
    meanwhile. From then on ``loss = loss_weight * sum over levels of masked_loss``, see :func:`masked_loss`, with the masks of
    the teacher's feature, and ``both_begin`` steps later these times those that the same tokens find in the student's.

    Of a detector the neck is compared, and each image weighs the tokens. Of a segmentor these are the class logits, and all
    tokens count alike. The first steps need labels; images of a detector without are left out of it.

    Args:
        layer: The student's layer. Default: ``'neck'`` of detectors, the decode head's classifier of segmentors.
        loss_weight: Of ``loss``, a number or a schedule. Default 1, for Faster R-CNN; RetinaNet 7, FCOS 10, segmentors 0.5.
        tokens: How many masks there are of each level, at least 2. Default 6.
        token_steps: How many steps the tokens learn. Default 2000.
        both_begin: After how many steps of distillation, counted from ``token_steps``, the student's masks count, too. None:
            they never do. Default 7000.
        teacher_layer: The teacher's layer, where its name differs.
        adapter: ``'auto'`` (1x1 convolution exactly where channels differ), None or a dict.

    Raises:
        ConfigError: for a teacher whose own loss cannot be taken of that layer, or whose classes are others.

    Example:
        >>> distillers = dict(maskd=dict(type='MasKD', loss_weight=7.0))    # RetinaNet
        >>> distillers = dict(maskd=dict(type='MasKD', loss_weight=0.5, tokens=8, both_begin=None))    # segmentors
    """

    def __init__(
        self,
        layer: str | None = None,
        loss_weight: float | Mapping = 1.0,
        tokens: int = 6,
        token_steps: int = 2000,
        both_begin: int | None = 7000,
        teacher_layer: str | None = None,
        adapter: str | Mapping | None = 'auto',
    ):
        super().__init__(layer, loss_weight, tokens, token_steps, teacher_layer, adapter)
        if both_begin is not None and not is_whole(both_begin):
            raise ConfigError(f'both_begin={both_begin!r}: expected a number of steps, or None')
        self.both_begin = both_begin

    def level_tokens(self, channels: int, teacher: nn.Module) -> LevelTokens:
        weighted = not hasattr(teacher, 'decode_head')
        return ReceptiveTokens(channels, self.number, weighted, self.both_begin)
