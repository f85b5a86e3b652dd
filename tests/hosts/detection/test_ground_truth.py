import math

import torch
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData

from mmkd.hosts.detection.ground_truth import covered_cells, ground_truth


def samples(*numbers):
    found = []
    for number in numbers:
        sample = DetDataSample()
        labels = torch.arange(number)
        sample.gt_instances = InstanceData(bboxes=torch.rand(number, 4) * 50, labels=labels)
        found.append(sample)
    return found


def test_objects_are_padded_to_the_most_in_an_image():
    batch = samples(2, 0, 3)
    found = ground_truth(batch)
    assert found.boxes.shape == (3, 3, 4)
    assert found.valid.sum(1).tolist() == [2, 0, 3]
    for index, sample in enumerate(batch):
        assert torch.equal(found.boxes[index][found.valid[index]], sample.gt_instances.bboxes)
    assert not found.boxes[~found.valid].any()


def test_a_batch_without_objects_has_one_that_is_not_there():
    found = ground_truth(samples(0, 0))
    assert found.boxes.shape == (2, 1, 4)
    assert not found.valid.any()


def test_covered_cells_as_plain_loops():
    """A map of 6x8 for 96x128 pixels; the last box is thinner than a cell, one ends on a cell's edge."""
    boxes = torch.tensor([[[3.0, 5, 40, 50], [16, 16, 32, 48], [100, 90, 128, 96], [20, 20, 20.5, 21]]])
    valid = torch.tensor([[True, True, True, True]])
    found = covered_cells(boxes, valid, (6, 8), (96, 128))
    for index, (x1, y1, x2, y2) in enumerate(boxes[0].tolist()):
        for row in range(6):
            for column in range(8):
                inside = math.floor(x1 / 16) <= column < math.ceil(x2 / 16) and math.floor(y1 / 16) <= row < math.ceil(
                    y2 / 16
                )
                assert found[0, index, row, column].item() == inside
    assert found.sum((2, 3)).tolist() == [[12, 2, 2, 1]]


def test_every_box_touches_a_cell_and_an_absent_one_none():
    boxes = torch.tensor([[[128.0, 96, 128, 96], [10, 10, 10, 10], [0, 0, 128, 96]]])
    found = covered_cells(boxes, torch.tensor([[True, True, False]]), (6, 8), (96, 128))
    assert found.sum((2, 3)).tolist() == [[1, 1, 0]]
