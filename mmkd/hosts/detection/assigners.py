"""The assigners of mmdet, for a batch of images at once."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from mmdet.models.task_modules.assigners import MaxIoUAssigner

from mmkd.hosts.detection.boxes import pairwise_iou


def max_iou_assigned(
    assigner: MaxIoUAssigner, priors: torch.Tensor, boxes: torch.Tensor, valid: torch.Tensor, inside: torch.Tensor
) -> torch.Tensor:
    """Which priors ``MaxIoUAssigner.assign`` makes positive, for a batch of images at once.

    The assigner itself loops over the boxes and waits for the device at each; which box a prior belongs to is
    not needed here.

    Args:
        assigner: The assigner, for its thresholds.
        priors: (N, 4).
        boxes: (B, K, 4).
        valid: (B, K), False for a box that is not there.
        inside: (B, N), False for priors that take no part.

    Returns:
        (B, N), bool.
    """
    overlaps = pairwise_iou(boxes, priors.expand(len(boxes), -1, -1))  # (B, K, N)
    overlaps = overlaps.masked_fill(~(valid[:, :, None] & inside[:, None]), -1)
    positive = overlaps.amax(1) >= assigner.pos_iou_thr
    if assigner.match_low_quality:
        best, index = overlaps.max(2, keepdim=True)
        # a box that touches no prior has best 0, which mmdet would match with every prior
        matched = (best >= assigner.min_pos_iou) & (best > 0)
        if assigner.gt_max_assign_all:
            positive |= ((overlaps == best) & matched).any(1)
        else:
            positive |= torch.zeros_like(overlaps, dtype=torch.bool).scatter_(2, index, matched).any(1)
    return positive


class ATSS(NamedTuple):
    """What adaptive training sample selection finds for each box."""

    positive: torch.Tensor
    """(B, K, N), bool: anchors that are candidates of the box, overlap it by the threshold and have their center in it."""
    overlaps: torch.Tensor
    """(B, K, N): IoU."""
    threshold: torch.Tensor
    """(B, K): mean and standard deviation of the candidates' IoU, added."""


def atss(
    topk: int,
    anchors: torch.Tensor,
    sizes: Sequence[int],
    boxes: torch.Tensor,
    valid: torch.Tensor,
    inside: torch.Tensor,
) -> ATSS:
    """Adaptive training sample selection as in mmdet's ``ATSSAssigner``, for a batch of images at once.

    Candidates of a box are, on each level, the ``topk`` anchors whose centers are nearest to its own. A slot that is
    positive for several boxes belongs to the one it overlaps most.

    Args:
        topk: Candidates per level.
        anchors: (N, 4), xyxy in pixels.
        sizes: Anchors of each level.
        boxes: (B, K, 4), xyxy in pixels.
        valid: (B, K), False for a box that is not there.
        inside: (B, N), False for anchors that take no part.
    """
    batch, number = valid.shape
    inside = inside.repeat_interleave(number, 0).t()  # (N, B * K)
    boxes = boxes.flatten(0, 1)
    overlaps = pairwise_iou(anchors, boxes)  # (N, B * K)
    centers, box_centers = (anchors[:, :2] + anchors[:, 2:]) / 2, (boxes[:, :2] + boxes[:, 2:]) / 2
    distances = (centers[:, None] - box_centers[None]).pow(2).sum(-1).sqrt()
    distances = distances.masked_fill(~inside, torch.inf)
    candidates, start = [], 0
    for level in distances.split(list(sizes)):
        candidates.append(level.topk(min(topk, len(level)), dim=0, largest=False)[1] + start)
        start += len(level)
    index = torch.cat(candidates)
    candidate_overlaps = overlaps.gather(0, index)
    there = inside.gather(0, index)
    count = there.sum(0)
    mean = (candidate_overlaps * there).sum(0) / count
    variance = ((candidate_overlaps - mean).square() * there).sum(0) / (count - 1)
    threshold = mean + variance.sqrt()
    sides = torch.cat([centers[:, None] - boxes[:, :2], boxes[:, 2:] - centers[:, None]], -1)  # (N, B * K, 4)
    chosen = (candidate_overlaps >= threshold) & (sides.amin(-1) > 0.01).gather(0, index) & there & valid.flatten()
    positive = torch.zeros_like(overlaps, dtype=torch.bool).scatter_(0, index, chosen)
    shape = (batch, number, len(anchors))
    return ATSS(positive.t().view(shape), overlaps.t().view(shape), threshold.view(batch, number))
