"""RoIAlign over a feature pyramid, for a fixed number of boxes per image and without waiting for the device."""

from collections.abc import Sequence

import torch


def box_levels(boxes: torch.Tensor, strides: Sequence[int]) -> torch.Tensor:
    """The pyramid level of each box: floor(log2(sqrt(w h) / (14 * first stride))), within the pyramid.

    For P2 to P5 this is mmdet's rule with ``finest_scale=56``; for P3 to P7 the same boxes go to the same maps.

    Args:
        boxes: (..., 4), xyxy in pixels of the padded input.
        strides: The stride of each level, in pixels, each twice the one before.

    Returns:
        (...), integers from 0 to ``len(strides) - 1``.
    """
    size = ((boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])).clamp(min=0).sqrt()
    level = torch.floor(torch.log2(size / (14 * strides[0]) + 1e-6))
    return level.clamp(0, len(strides) - 1).long()


def pool_boxes(
    levels: Sequence[torch.Tensor],
    boxes: torch.Tensor,
    strides: Sequence[int],
    output_size: int = 10,
    sampling_ratio: int = 2,
) -> torch.Tensor:
    """RoIAlign (aligned corners of half a pixel) of each box from the level that its size gives.

    Equal to mmcv's ``RoIAlign(aligned=True)`` on that level. Bilinear sampling is separable, so pooling a box is a product
    of three matrices, rows of weights times map times columns of weights; a box has weight 0 on all levels but its
    own. There are no indices, the number of operations does not depend on the boxes, nothing waits for the device, and
    forward and backward pass are deterministic.

    Args:
        levels: Maps of (B, C, H_l, W_l).
        boxes: (B, K, 4), xyxy in pixels of the padded input.
        strides: The stride of each level, in pixels.
        output_size: Cells along each side of a pooled box.
        sampling_ratio: Samples along each side of a cell.

    Returns:
        (B, K, C, output_size, output_size); differentiable in the levels, not in the boxes.
    """
    boxes = boxes.detach()
    level = box_levels(boxes, strides)
    samples = output_size * sampling_ratio
    center = (torch.arange(samples, device=boxes.device, dtype=boxes.dtype) + 0.5) / samples
    pooled: torch.Tensor | float = 0.0
    for index, (feature, stride) in enumerate(zip(levels, strides, strict=True)):
        corners = boxes / stride - 0.5
        x = corners[..., 0, None] + (corners[..., 2] - corners[..., 0])[..., None] * center  # (B, K, samples)
        y = corners[..., 1, None] + (corners[..., 3] - corners[..., 1])[..., None] * center
        rows = _weights(y, feature.shape[2], output_size) * (level == index)[..., None, None]  # (B, K, P, H)
        columns = _weights(x, feature.shape[3], output_size)  # (B, K, Q, W)
        strips = torch.einsum('bkph,bhwc->bkpwc', rows, feature.permute(0, 2, 3, 1))
        pooled = pooled + torch.einsum('bkqw,bkpwc->bkcpq', columns, strips)
    return pooled


def _weights(position: torch.Tensor, size: int, output_size: int) -> torch.Tensor:
    """How much each of ``size`` pixels adds to each cell, (B, K, samples) -> (B, K, output_size, size).

    A sample gets 1 - distance of its two neighbours, or the border's value within a pixel of the border, or 0 outside
    [-1, size]; a cell is the mean of its samples.
    """
    inside = (position >= -1) & (position <= size)
    distance = position.clamp(0, size - 1)[..., None] - torch.arange(size, device=position.device)
    weights = (1 - distance.abs()).clamp(min=0) * inside[..., None]
    return weights.unflatten(2, (output_size, -1)).mean(3)
