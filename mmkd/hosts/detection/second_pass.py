"""A detector's heads once more, over maps that are not those of its neck."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from mmkd.errors import ConfigError
from mmkd.hosts.partial_labels import partly_labelled
from mmkd.hosts.running import counted_once


def check_heads(model: nn.Module, method: str) -> None:
    """Raise ConfigError unless :func:`losses_of_maps` can run a model's heads."""
    heads = hasattr(model, 'bbox_head') or hasattr(model, 'roi_head')
    if not heads or getattr(model, 'neck', None) is None or hasattr(model, 'forward_transformer'):
        raise ConfigError(
            f'{type(model).__name__}: {method} runs the heads over maps made of labels; a detector with a neck, and a bbox_head '
            f'or an rpn_head and roi_head that read it, is needed'
        )


def classes_of(model: nn.Module) -> int:
    """How many classes a detector tells apart."""
    head = model.roi_head.bbox_head if hasattr(model, 'roi_head') else model.bbox_head
    return (head[0] if isinstance(head, nn.ModuleList) else head).num_classes  # of a cascade all have as many


def refuse_partly_labelled(data_samples: Sequence | None) -> None:
    """Raise ConfigError for images that are labelled for some classes alone."""
    if partly_labelled(data_samples):
        raise ConfigError(
            'a batch has images that are labelled for some classes alone, of whose labels no maps of all objects can be made; '
            'train on images with all labels'
        )


def losses_of_maps(model: nn.Module, maps: Sequence[torch.Tensor], data_samples: Sequence) -> torch.Tensor:
    """The sum of a detector's own losses, as if ``maps`` were what its neck put out.

    Batch norms of the heads normalize by the batch, as in training, and keep their running statistics, which are of the
    neck's maps alone. Hooks of taps are not there any more, or not yet.

    Args:
        model: A detector, see :func:`check_heads`.
        maps: The levels of the neck, (B, C, H, W).
        data_samples: The batch's; they stay as they are.

    Raises:
        ConfigError: for images that are labelled for some classes alone.
    """
    refuse_partly_labelled(data_samples)
    with _features(model, maps), counted_once(model):
        losses = model.loss(None, copy.deepcopy(list(data_samples)))
    values = (value for key, value in losses.items() if 'loss' in key)
    terms = [each.mean() for value in values for each in (value if isinstance(value, (list, tuple)) else [value])]
    return torch.stack(terms).sum()


@contextmanager
def _features(model: nn.Module, maps: Sequence[torch.Tensor]) -> Iterator[None]:
    # every detector's `loss` begins with this call
    model.extract_feat = lambda inputs: tuple(maps)
    try:
        yield
    finally:
        del model.extract_feat
