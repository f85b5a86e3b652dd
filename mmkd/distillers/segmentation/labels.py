"""The ground truth of a batch, for methods that compare pixels by their class or leave ignored ones out."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from mmkd.errors import ConfigError


def ground_truth(data_samples: Sequence | None) -> torch.Tensor:
    """The label maps of a batch, padded as the images are, (B, H, W) int64.

    Raises:
        ConfigError: if a sample has none.
    """
    if not data_samples or any('gt_sem_seg' not in sample for sample in data_samples):
        raise ConfigError(
            "data_samples: an image has no gt_sem_seg, which this method needs; its pipeline needs type='LoadAnnotations'"
        )
    return torch.cat([sample.gt_sem_seg.data for sample in data_samples])


def ignore_index(model: nn.Module) -> int:
    """The label that a segmentor's decode head leaves out of its loss; mmseg's default is 255."""
    head = model.decode_head
    return (head[-1] if isinstance(head, nn.ModuleList) else head).ignore_index


def resize_labels(labels: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Label maps (B, H, W) at another size, (B, h, w): each position takes the label of the nearest pixel."""
    if tuple(labels.shape[1:]) == tuple(size):
        return labels
    return F.interpolate(labels[:, None].float(), tuple(size), mode='nearest')[:, 0].long()


def labelled(model: nn.Module, data_samples: Sequence | None, size: Sequence[int]) -> torch.Tensor:
    """Which positions of a (h, w) map have a label that the model's decode head does not ignore, (B, h, w) bool."""
    return resize_labels(ground_truth(data_samples), size) != ignore_index(model)
