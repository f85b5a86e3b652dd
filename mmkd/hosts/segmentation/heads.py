"""The heads of a segmentor."""

from torch import nn


def decode_head(model: nn.Module) -> nn.Module:
    """A segmentor's decode head, the last one of a cascade."""
    head = model.decode_head
    return head[-1] if isinstance(head, nn.ModuleList) else head
