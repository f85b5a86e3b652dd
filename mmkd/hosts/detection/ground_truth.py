"""Ground truth of a batch as tensors of one shape, and where it lies on a feature map."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from mmdet.structures.bbox import get_box_tensor
from torch.nn.utils.rnn import pad_sequence

from mmkd.data.domains import is_unlabelled
from mmkd.errors import ConfigError


class GroundTruth(NamedTuple):
    """The objects of a batch, padded to the largest number in an image, at least 1."""

    boxes: torch.Tensor
    """(B, K, 4), xyxy in pixels of the padded input; 0 where there is none."""
    valid: torch.Tensor
    """(B, K), False where there is none."""


def ground_truth(data_samples: Sequence) -> GroundTruth:
    """The annotated objects of a batch of mmdet's data samples.

    Raises:
        ConfigError: if an image has no labels.
    """
    if any(is_unlabelled(sample) for sample in data_samples):
        raise ConfigError(
            'a batch has images without labels, and this method reads the ground truth; use one that does not, such as CWD, PKD, '
            'GID or KD'
        )
    boxes = [get_box_tensor(sample.gt_instances.bboxes) for sample in data_samples]
    most = max(1, *(len(each) for each in boxes))
    # a first row that is as long as the longest makes all so
    padded = pad_sequence([boxes[0].new_zeros(most, 4), *boxes], batch_first=True)[1:]
    counts = torch.tensor([len(each) for each in boxes]).to(padded.device, non_blocking=True)
    return GroundTruth(padded, torch.arange(most, device=padded.device) < counts[:, None])


def ground_truth_labels(data_samples: Sequence) -> torch.Tensor:
    """(B, K), the classes of the boxes of :func:`ground_truth`, from 0; 0 where there is none."""
    labels = [sample.gt_instances.labels for sample in data_samples]
    most = max(1, *(len(each) for each in labels))
    return pad_sequence([labels[0].new_zeros(most), *labels], batch_first=True)[1:]


def padded_shape(data_samples: Sequence) -> tuple[int, int]:
    """Height and width of the padded input in pixels, to which the feature maps belong."""
    return tuple(data_samples[0].metainfo['batch_input_shape'][:2])


def covered_cells(boxes: torch.Tensor, valid: torch.Tensor, size: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
    """The cells of a feature map that each box touches.

    A cell is ``shape / size`` pixels wide and high. A box from x1 to x2 touches the columns floor(x1 / cell) to
    ceil(x2 / cell) - 1, so that no box touches none.

    Args:
        boxes: (B, K, 4), xyxy in pixels of the padded input.
        valid: (B, K), False for a box that is not there.
        size: H and W of the map.
        shape: Height and width of the padded input, see :func:`padded_shape`.

    Returns:
        (B, K, H, W), bool.
    """

    def along(first: torch.Tensor, last: torch.Tensor, cells: int, pixels: int) -> torch.Tensor:
        # a box on the last edge or beyond it has the last cell
        first = (first * cells / pixels).floor().clamp(0, cells - 1)
        last = torch.maximum((last * cells / pixels).ceil(), first + 1)
        position = torch.arange(cells, device=boxes.device)
        return (position >= first[..., None]) & (position < last[..., None])

    rows = along(boxes[..., 1], boxes[..., 3], size[0], shape[0])
    columns = along(boxes[..., 0], boxes[..., 2], size[1], shape[1])
    return rows[..., :, None] & columns[..., None, :] & valid[..., None, None]
