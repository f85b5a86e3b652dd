"""A segmentor's own losses with a weight for the label of each pixel.

mmseg's heads ask a ``sampler`` for the weights of pixels before they compute their losses. While these weights are in force each
head has one that gives them, times those of its own sampler, if it has any.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from mmkd.errors import ConfigError


def _heads(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for part in ('decode_head', 'auxiliary_head'):
        heads = getattr(model, part, None)
        if heads is not None:
            for head in heads if isinstance(heads, nn.ModuleList) else [heads]:
                yield part, head


def check_label_weights(model: nn.Module) -> None:
    """Raise ConfigError unless the labels of a segmentor's losses can be weighted pixel by pixel."""
    from mmseg.models.decode_heads.decode_head import BaseDecodeHead  # detection needs no mmseg
    from mmseg.models.losses import CrossEntropyLoss

    for part, head in _heads(model):
        if getattr(type(head), 'loss_by_feat', None) is not BaseDecodeHead.loss_by_feat:
            raise ConfigError(
                f'{part} is a {type(head).__name__}, which computes its loss in its own way, without weights of pixels; another '
                f'head is needed'
            )
        found = head.loss_decode if isinstance(head.loss_decode, nn.ModuleList) else [head.loss_decode]
        for loss in found:
            if type(loss) is not CrossEntropyLoss or loss.use_sigmoid or loss.use_mask:
                raise ConfigError(
                    f"{part}.loss_decode: {type(loss).__name__} takes no weight for each pixel; use type='CrossEntropyLoss' with "
                    f'a softmax'
                )


class _Weights:
    """In place of a head's sampler."""

    def __init__(self, weights: torch.Tensor, own: Any):
        self.weights, self.own = weights, own

    def sample(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.weights if self.own is None else self.weights * self.own.sample(logits, labels)


@contextlib.contextmanager
def weighted_labels(model: nn.Module, weights: torch.Tensor | None) -> Iterator[None]:
    """While it lasts, the losses of ``model``'s heads count each pixel times its weight; what they divide by is as ever.

    Args:
        model: The segmentor.
        weights: (B, H, W), of the pixels of the labels; None for 1.
    """
    if weights is None:
        yield
        return
    heads = [head for _, head in _heads(model)]
    samplers = [head.sampler for head in heads]
    try:
        for head, own in zip(heads, samplers):
            head.sampler = _Weights(weights, own)
        yield
    finally:
        for head, own in zip(heads, samplers):
            head.sampler = own
