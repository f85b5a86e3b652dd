import pytest
import torch
from mmcv.ops import RoIAlign

from mmkd.hosts.detection.roi_pool import box_levels, pool_boxes

STRIDES = [8, 16, 32]


@pytest.fixture
def pyramid():
    return [torch.randn(2, 5, 96 // stride, 160 // stride, requires_grad=True) for stride in STRIDES]


def boxes_of_all_kinds():
    """Inside, at and over each border, thin, tiny, of no area, and of sizes for each level; (2, 8, 4)."""
    first = [
        [3.0, 5.0, 40.0, 70.0],
        [-20.0, -10.0, 30.0, 20.0],
        [140.0, 80.0, 175.0, 120.0],
        [0.0, 0.0, 160.0, 96.0],
        [10.0, 10.0, 10.5, 90.0],
        [50.0, 50.0, 50.0, 50.0],
        [-300.0, -300.0, 700.0, 700.0],
        [20.0, 20.0, 300.0, 90.0],
    ]
    return torch.tensor([first, first[::-1]])


def with_mmcv(pyramid, boxes, size, ratio):
    """One box at a time, from the level of the rule in mmdet's SingleRoIExtractor."""
    finest = 14 * STRIDES[0]
    pooled = []
    for image, of_image in enumerate(boxes):
        for box in of_image:
            scale = ((box[2] - box[0]) * (box[3] - box[1])).sqrt()
            level = int(torch.floor(torch.log2(scale / finest + 1e-6)).clamp(0, len(STRIDES) - 1))
            align = RoIAlign(size, 1 / STRIDES[level], ratio, aligned=True)
            pooled.append(align(pyramid[level], torch.cat([torch.tensor([float(image)]), box])[None]))
    return torch.cat(pooled).view(*boxes.shape[:2], -1, size, size)


@pytest.mark.parametrize(('size', 'ratio'), [(10, 2), (7, 1), (3, 4)])
def test_it_equals_mmcvs_roi_align(pyramid, size, ratio):
    boxes = boxes_of_all_kinds()
    pooled = pool_boxes(pyramid, boxes, STRIDES, size, ratio)
    torch.testing.assert_close(pooled, with_mmcv(pyramid, boxes, size, ratio), rtol=1e-4, atol=1e-5)


def test_its_gradient_equals_mmcvs(pyramid):
    boxes = boxes_of_all_kinds()
    boxes[0, 0] = torch.tensor([0.0, 0.0, 300.0, 250.0])  # so that each level has one
    weights = torch.randn(2, 8, 5, 10, 10)
    ours = torch.autograd.grad((pool_boxes(pyramid, boxes, STRIDES) * weights).sum(), pyramid)
    theirs = torch.autograd.grad((with_mmcv(pyramid, boxes, 10, 2) * weights).sum(), pyramid)
    for mine, other in zip(ours, theirs):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4)


def test_channels_last_maps(pyramid):
    boxes = boxes_of_all_kinds()
    last = [level.contiguous(memory_format=torch.channels_last) for level in pyramid]
    torch.testing.assert_close(pool_boxes(last, boxes, STRIDES), pool_boxes(pyramid, boxes, STRIDES))


def test_levels_are_those_of_mmdet():
    from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor

    extractor = SingleRoIExtractor(dict(type='RoIAlign', output_size=7), 4, [4, 8, 16, 32], finest_scale=56)
    sides = torch.tensor([3.0, 55.9, 111.9, 112.0, 113.0, 223.0, 224.0, 225.0, 447.0, 449.0, 2000.0])
    boxes = torch.stack([torch.zeros_like(sides), torch.zeros_like(sides), sides, sides], 1)
    rois = torch.cat([torch.zeros(len(boxes), 1), boxes], 1)
    assert torch.equal(box_levels(boxes, [4, 8, 16, 32]), extractor.map_roi_levels(rois, 4))


def test_a_box_below_224_pixels_goes_to_the_finest_of_p3_to_p7():
    boxes = torch.tensor([[0.0, 0.0, 223.0, 223.0], [0.0, 0.0, 225.0, 225.0]])
    assert box_levels(boxes, [8, 16, 32, 64, 128]).tolist() == [0, 1]
