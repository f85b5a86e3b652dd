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


def decode_head(model: nn.Module) -> nn.Module:
    """A segmentor's decode head, the last one of a cascade."""
    head = model.decode_head
    return head[-1] if isinstance(head, nn.ModuleList) else head


def ignore_index(model: nn.Module) -> int:
    """The label that a segmentor's decode head leaves out of its loss; mmseg's default is 255."""
    return decode_head(model).ignore_index


def resize_labels(labels: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Label maps (B, H, W) at another size, (B, h, w): position i takes the label of pixel floor(i * H / h)."""
    if tuple(labels.shape[1:]) == tuple(size):
        return labels
    return F.interpolate(labels[:, None].float(), tuple(size), mode='nearest')[:, 0].long()


def labeled(model: nn.Module, data_samples: Sequence | None, size: Sequence[int]) -> torch.Tensor:
    """Which positions of a (h, w) map have a label that the model's decode head does not ignore, (B, h, w) bool."""
    return resize_labels(ground_truth(data_samples), size) != ignore_index(model)


def class_masks(model: nn.Module, data_samples: Sequence | None, size: Sequence[int]) -> torch.Tensor:
    """Which positions of a (h, w) map belong to which class of the model's decode head, (B, K, h, w) bool.

    Ignored positions belong to none.
    """
    labels = resize_labels(ground_truth(data_samples), size)
    labels = labels.masked_fill(labels == ignore_index(model), -1)
    classes = torch.arange(decode_head(model).num_classes, device=labels.device)
    return labels[:, None] == classes[:, None, None]
