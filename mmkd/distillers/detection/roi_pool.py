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

    Equal to mmcv's ``RoIAlign(aligned=True)`` on that level. All boxes are pooled in one gather from all
    levels: the number of operations does not depend on the boxes, and nothing waits for the device.

    Args:
        levels: Maps of (B, C, H_l, W_l).
        boxes: (B, K, 4), xyxy in pixels of the padded input.
        strides: The stride of each level, in pixels.
        output_size: Cells along each side of a pooled box.
        sampling_ratio: Samples along each side of a cell.

    Returns:
        (B, K, C, output_size, output_size); differentiable in the levels, not in the boxes.
    """
    batch, channels = levels[0].shape[:2]
    number = boxes.shape[1]
    device = boxes.device
    with torch.no_grad():
        level = box_levels(boxes, strides)  # (B, K)
        heights, widths, starts = _per_level(levels, device)
        height, width, start = heights[level], widths[level], starts[level]
        scale = _on(device, [1 / stride for stride in strides])[level]
        corners = boxes * scale[..., None] - 0.5
        steps = output_size * sampling_ratio
        centre = (torch.arange(steps, device=device, dtype=boxes.dtype) + 0.5) / steps
        x = corners[..., 0, None] + (corners[..., 2] - corners[..., 0])[..., None] * centre  # (B, K, steps)
        y = corners[..., 1, None] + (corners[..., 3] - corners[..., 1])[..., None] * centre
        y_index, y_weight = _neighbours(y, height)  # (B, K, steps, 2)
        x_index, x_weight = _neighbours(x, width)
        per_image = int(sum(each.shape[2] * each.shape[3] for each in levels))
        image = torch.arange(batch, device=device)[:, None] * per_image
        base = (start + image)[..., None, None]
        rows = base + y_index * width[..., None, None]
        # (B, K, y steps, 2, x steps, 2) -> cells with sampling_ratio**2 * 4 neighbours each
        index = _cells(rows[..., None, None] + x_index[:, :, None, None], output_size, sampling_ratio)
        weight = _cells(y_weight[..., None, None] * x_weight[:, :, None, None], output_size, sampling_ratio)
        weight = weight / sampling_ratio**2
    table = torch.cat([each.permute(0, 2, 3, 1).flatten(1, 2) for each in levels], dim=1).flatten(0, 1)
    gathered = table.index_select(0, index.flatten()).view(*index.shape, channels)
    pooled = torch.bmm(weight[:, None], gathered).squeeze(1)  # (cells, C)
    return pooled.view(batch, number, output_size, output_size, channels).permute(0, 1, 4, 2, 3)


def _on(device: torch.device, values: Sequence[float]) -> torch.Tensor:
    """A small constant on the device, copied without waiting for it."""
    return torch.tensor(values).to(device, non_blocking=True)


def _per_level(levels: Sequence[torch.Tensor], device: torch.device) -> tuple[torch.Tensor, ...]:
    heights = [each.shape[2] for each in levels]
    widths = [each.shape[3] for each in levels]
    starts = [0]
    for height, width in zip(heights[:-1], widths[:-1]):
        starts.append(starts[-1] + height * width)
    return _on(device, heights), _on(device, widths), _on(device, starts)


def _neighbours(position: torch.Tensor, size: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices and weights of the two cells on either side of each position, (..., steps, 2).

    A position outside [-1, size] has weight 0; one within a pixel of the border takes the border's value.
    """
    size = size[..., None]
    inside = (position >= -1) & (position <= size)
    position = torch.minimum(position.clamp(min=0), (size - 1).to(position.dtype))
    low = position.floor()
    high = torch.minimum(low + 1, (size - 1).to(position.dtype))
    fraction = position - low
    weights = torch.stack([1 - fraction, fraction], dim=-1) * inside[..., None]
    return torch.stack([low, high], dim=-1).long(), weights


def _cells(grid: torch.Tensor, output_size: int, sampling_ratio: int) -> torch.Tensor:
    """(B, K, steps, 2, steps, 2) -> (B * K * output_size**2, samples * 4)."""
    batch, number = grid.shape[:2]
    grid = grid.reshape(batch, number, output_size, sampling_ratio * 2, output_size, sampling_ratio * 2)
    return grid.transpose(3, 4).reshape(batch * number * output_size**2, (sampling_ratio * 2) ** 2)
