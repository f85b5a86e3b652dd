import torch
from mmdet.models.task_modules.coders import DeltaXYWHBBoxCoder
from mmdet.structures.bbox import bbox_overlaps

from mmkd.hosts.detection.boxes import decode_deltas, giou, pairwise_iou


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


def test_the_giou_is_mmdets():
    first, second = random_boxes(3, 40), random_boxes(3, 40)
    second[:, 1], second[:, 2] = first[:, 1], first[:, 2] + 500  # the same, and far away
    first[:, 0, 2:] = first[:, 0, :2]  # of no area
    torch.testing.assert_close(giou(first, second), bbox_overlaps(first, second, mode='giou', is_aligned=True))
    torch.testing.assert_close(giou(first, second)[:, 1], torch.ones(3))
    assert (giou(first, second)[:, 2] < -0.5).all()
