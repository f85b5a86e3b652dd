"""The ground truth of a batch, for methods that compare pixels by their class or leave ignored ones out.

A position of a map stands for a pixel of the image: the one nearest to where the decode head puts it when it resizes its
logits for its loss. With ``align_corners=False``, mmseg's usual, position i of h lies at (i + 0.5) * H / h - 0.5 of H
pixels, the middle of its cell; with ``align_corners=True`` at i * (H - 1) / (h - 1). Of two pixels that are equally near
it is the latter.
"""

from collections.abc import Sequence

import torch
from torch import nn

from mmkd.errors import ConfigError
from mmkd.hosts.segmentation.heads import decode_head


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
    return decode_head(model).ignore_index


def pixels_of(
    positions: int, pixels: int, align_corners: bool, device: torch.device | str | None = None
) -> torch.Tensor:
    """Which of a row of pixels each of a row of positions stands for, see above.

    Args:
        positions: h, at least 1.
        pixels: H.
        align_corners: How the map is resized to the image.
        device: Where the result is made.

    Returns:
        (h,) int64, from 0 to H - 1.
    """
    i = torch.arange(positions, device=device)
    if align_corners and positions > 1:
        return (2 * i * (pixels - 1) + positions - 1) // (2 * (positions - 1))
    return (2 * i + 1) * pixels // (2 * positions)


def resize_labels(labels: torch.Tensor, size: Sequence[int], align_corners: bool = False) -> torch.Tensor:
    """Label maps (B, H, W) at another size, (B, h, w): each position has the label of the pixel that it stands for."""
    if tuple(labels.shape[1:]) == tuple(size):
        return labels
    for dim, positions in enumerate(size, 1):
        labels = labels.index_select(dim, pixels_of(positions, labels.shape[dim], align_corners, labels.device))
    return labels


def labels_at(model: nn.Module, data_samples: Sequence | None, size: Sequence[int]) -> torch.Tensor:
    """The labels of a batch at the positions of a (h, w) map of the model, (B, h, w) int64."""
    return resize_labels(ground_truth(data_samples), size, decode_head(model).align_corners)


def labeled(model: nn.Module, data_samples: Sequence | None, size: Sequence[int]) -> torch.Tensor:
    """Which positions of a (h, w) map have a label that the model's decode head does not ignore, (B, h, w) bool."""
    return labels_at(model, data_samples, size) != ignore_index(model)


def class_masks(model: nn.Module, data_samples: Sequence | None, size: Sequence[int]) -> torch.Tensor:
    """Which positions of a (h, w) map belong to which class of the model's decode head, (B, K, h, w) bool.

    Ignored positions belong to none.
    """
    labels = labels_at(model, data_samples, size)
    labels = labels.masked_fill(labels == ignore_index(model), -1)
    classes = torch.arange(decode_head(model).num_classes, device=labels.device)
    return labels[:, None] == classes[:, None, None]
