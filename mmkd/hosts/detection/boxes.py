"""Operations on boxes, xyxy in pixels, that never wait for the device.

mmdet's own copy small constants to the device at each call, and each such copy waits for all work before it.
"""

import math

import torch


def pairwise_iou(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Intersection over union of each box with each.

    Args:
        first: (..., N, 4).
        second: (..., M, 4).

    Returns:
        (..., N, M), equal to mmdet's ``bbox_overlaps``.
    """
    area_first = (first[..., 2] - first[..., 0]) * (first[..., 3] - first[..., 1])
    area_second = (second[..., 2] - second[..., 0]) * (second[..., 3] - second[..., 1])
    top_left = torch.maximum(first[..., :, None, :2], second[..., None, :, :2])
    bottom_right = torch.minimum(first[..., :, None, 2:], second[..., None, :, 2:])
    sides = (bottom_right - top_left).clamp(min=0)
    overlap = sides[..., 0] * sides[..., 1]
    union = area_first[..., None] + area_second[..., None, :] - overlap
    return overlap / union.clamp(min=1e-6)


def pairwise_iof(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """How much of each box of the first, (N, 4), lies in each of the second, (M, 4): (N, M), 0 to 1."""
    top_left = torch.maximum(first[:, None, :2], second[None, :, :2])
    bottom_right = torch.minimum(first[:, None, 2:], second[None, :, 2:])
    overlap = (bottom_right - top_left).clamp(min=0).prod(-1)
    return overlap / (first[:, 2:] - first[:, :2]).prod(-1)[:, None].clamp(min=1e-6)


def pairwise_diou(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    r"""Distance IoU of each box with each.

    .. math:: \operatorname{DIoU} = \operatorname{IoU} - d^2 / c^2

    with d between the two centers and c the diagonal of the smallest box around both.

    Args:
        first: (..., N, 4).
        second: (..., M, 4).

    Returns:
        (..., N, M), in (-1, 1].
    """
    centers = [(boxes[..., :2] + boxes[..., 2:]) / 2 for boxes in (first, second)]
    distance = (centers[0][..., :, None, :] - centers[1][..., None, :, :]).square().sum(-1)
    top_left = torch.minimum(first[..., :, None, :2], second[..., None, :, :2])
    bottom_right = torch.maximum(first[..., :, None, 2:], second[..., None, :, 2:])
    diagonal = (bottom_right - top_left).square().sum(-1)
    return pairwise_iou(first, second) - distance / diagonal.clamp(min=1e-6)


def giou(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    r"""Generalized IoU of each box with the one at the same place.

    .. math:: \operatorname{GIoU} = \operatorname{IoU} - (c - u) / c

    with u the area of both together and c that of the smallest box around both.

    Args:
        first: (..., 4).
        second: The same shape.

    Returns:
        (...), in [-1, 1].
    """

    def area(boxes: torch.Tensor) -> torch.Tensor:
        return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])

    least, largest = torch.minimum(first, second), torch.maximum(first, second)
    shared, whole = (least[..., 2:] - largest[..., :2]).clamp(min=0), largest[..., 2:] - least[..., :2]
    # no `prod`, whose backward pass waits for the device
    overlap = shared[..., 0] * shared[..., 1]
    around = (whole[..., 0].clamp(min=0) * whole[..., 1].clamp(min=0)).clamp(min=1e-6)
    union = (area(first) + area(second) - overlap).clamp(min=1e-6)
    return overlap / union - (around - union) / around


def encode_deltas(
    priors: torch.Tensor, boxes: torch.Tensor, means: tuple[float, ...], stds: tuple[float, ...]
) -> torch.Tensor:
    """Deltas (dx, dy, dw, dh) of boxes relative to priors, equal to mmdet's ``bbox2delta``; :func:`decode_deltas` undoes it.

    Args:
        priors: (..., 4).
        boxes: (..., 4).
        means: Means of the four deltas.
        stds: Standard deviations of the four deltas.

    Returns:
        (..., 4); not finite for a box or a prior without width or height.
    """
    sides, own = (each[..., 2:] - each[..., :2] for each in (priors, boxes))
    shift = (boxes[..., :2] + boxes[..., 2:] - priors[..., :2] - priors[..., 2:]) * 0.5 / sides
    deltas = (*shift.unbind(-1), *(own / sides).log().unbind(-1))
    return torch.stack([(delta - mean) / std for delta, mean, std in zip(deltas, means, stds)], dim=-1)


def decode_deltas(
    priors: torch.Tensor,
    deltas: torch.Tensor,
    means: tuple[float, ...],
    stds: tuple[float, ...],
    max_ratio: float = 1000 / 16,
) -> torch.Tensor:
    """Boxes from deltas (dx, dy, dw, dh) relative to priors, equal to mmdet's ``delta2bbox`` without clipping.

    ``x = px + pw dx`` and ``w = pw exp(dw)``, and so for y and h. The deltas are first multiplied by ``stds`` and ``means``
    are added.

    Args:
        priors: (..., 4).
        deltas: (..., 4).
        means: Means of the four deltas.
        stds: Standard deviations of the four deltas.
        max_ratio: Sides grow and shrink at most by this factor.

    Returns:
        (..., 4).
    """
    dx, dy, dw, dh = (delta * std + mean for delta, mean, std in zip(deltas.unbind(-1), means, stds))
    limit = abs(math.log(max_ratio))
    width, height = priors[..., 2] - priors[..., 0], priors[..., 3] - priors[..., 1]
    x = (priors[..., 0] + priors[..., 2]) * 0.5 + width * dx
    y = (priors[..., 1] + priors[..., 3]) * 0.5 + height * dy
    half_width = width * dw.clamp(-limit, limit).exp() * 0.5
    half_height = height * dh.clamp(-limit, limit).exp() * 0.5
    return torch.stack([x - half_width, y - half_height, x + half_width, y + half_height], dim=-1)
