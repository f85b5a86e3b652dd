import pytest
import torch
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample

from mmkd.errors import ConfigError
from mmkd.hosts.segmentation.labels import class_masks, ground_truth, ignore_index, labeled, resize_labels
from mmkd.testing import models, segmentors
from mmkd.testing.batches import random_batch


def samples(*maps):
    return [SegDataSample(gt_sem_seg=PixelData(data=each[None])) for each in maps]


def test_images_of_two_sizes_are_padded_with_the_ignored_label():
    model = models.build(segmentors.pspnet())
    batches = [random_batch(model, (1, 3, *size), seed=seed) for seed, size in enumerate([(50, 70), (40, 90)])]
    maps = [batch['data_samples'][0].gt_sem_seg.data[0].clone() for batch in batches]
    batch = {key: batches[0][key] + batches[1][key] for key in batches[0]}
    data_samples = model.data_preprocessor(batch, True)['data_samples']
    labels = ground_truth(data_samples)
    assert labels.shape == (2, 64, 96)
    assert labels.dtype is torch.int64
    expected = torch.full((2, 64, 96), 255)
    expected[0, :50, :70], expected[1, :40, :90] = maps
    assert torch.equal(labels, expected)
    assert torch.equal(labeled(model, data_samples, (64, 96)), expected != 255)
    assert torch.equal(labeled(model, data_samples, (8, 12)), expected[:, ::8, ::8] != 255)


@pytest.mark.parametrize('size', [(3, 4), (7, 5), (6, 8), (13, 17)])
def test_labels_at_another_size_as_plain_loops(size):
    labels = torch.randint(0, 256, (2, 6, 8))
    found = resize_labels(labels, size)
    assert found.dtype is torch.int64
    for b in range(2):
        expected = [
            [labels[b, y * 6 // size[0], x * 8 // size[1]].item() for x in range(size[1])] for y in range(size[0])
        ]
        assert found[b].tolist() == expected


def test_labels_of_the_wanted_size_are_not_copied():
    labels = torch.randint(0, 19, (2, 6, 8))
    assert resize_labels(labels, torch.Size((6, 8))) is labels


def test_the_ignored_label_is_the_decode_heads():
    plain = models.build(segmentors.pspnet())
    other = models.build(segmentors.pspnet(decode_head=dict(ignore_index=7)))
    cascade = torch.nn.Module()
    cascade.decode_head = torch.nn.ModuleList([plain.decode_head, other.decode_head])
    assert [ignore_index(model) for model in (plain, other, cascade)] == [255, 7, 7]
    labels = torch.tensor([[7, 255], [0, 7]])
    assert labeled(other, samples(labels), (2, 2)).tolist() == [[[False, True], [True, False]]]


def test_positions_of_each_class():
    """An ignored label is of no class, even where it is the number of one."""
    labels = torch.tensor([[7, 255], [0, 18]])
    masks = class_masks(models.build(segmentors.pspnet()), samples(labels, labels), (4, 4))
    assert masks.shape == (2, 19, 4, 4)
    assert masks.dtype is torch.bool
    assert torch.equal(masks[0], masks[1])
    assert masks[0].sum((1, 2)).tolist() == [4 * (k in (0, 7, 18)) for k in range(19)]
    assert masks[0, 18, 2:, 2:].all()
    other = models.build(segmentors.pspnet(decode_head=dict(ignore_index=7)))
    masks = class_masks(other, samples(labels), (2, 2))
    assert masks[0].sum((1, 2)).tolist() == [int(k in (0, 18)) for k in range(19)]


@pytest.mark.parametrize('data_samples', [None, [], [SegDataSample()], [*samples(torch.zeros(2, 2)), SegDataSample()]])
def test_a_batch_without_labels_is_an_error(data_samples):
    with pytest.raises(ConfigError, match=r"no gt_sem_seg.*its pipeline needs type='LoadAnnotations'"):
        ground_truth(data_samples)
