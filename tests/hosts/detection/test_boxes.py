import torch
from mmdet.models.task_modules.coders import DeltaXYWHBBoxCoder
from mmdet.structures.bbox import bbox_overlaps

from mmkd.hosts.detection.boxes import decode_deltas, pairwise_iou


def random_boxes(*shape):
    first = 100 * torch.rand(*shape, 2)
    return torch.cat([first, first + 60 * torch.rand(*shape, 2)], -1)


def test_the_iou_is_mmdets_bit_for_bit():
    first, second = random_boxes(3, 40), random_boxes(3, 70)
    first[:, 0, 2:] = first[:, 0, :2]  # of no area
    assert torch.equal(pairwise_iou(first, second), bbox_overlaps(first, second))


def test_decoding_is_mmdets():
    coder = DeltaXYWHBBoxCoder(target_means=(0.1, -0.2, 0.3, 0.0), target_stds=(0.1, 0.2, 0.5, 2.0))
    priors, deltas = random_boxes(2, 50), 3 * torch.randn(2, 50, 4)
    expected = coder.decode(priors.view(-1, 4), deltas.view(-1, 4)).view(2, 50, 4)
    torch.testing.assert_close(decode_deltas(priors, deltas, coder.means, coder.stds), expected)
