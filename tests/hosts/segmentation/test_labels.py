from fractions import Fraction

import pytest
import torch
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample

from mmkd.errors import ConfigError
from mmkd.hosts.segmentation.labels import class_masks, ground_truth, ignore_index, labeled, labels_at, resize_labels
from mmkd.hosts.segmentation.logits import resize_logits
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
    assert torch.equal(labeled(model, data_samples, (8, 12)), expected[:, 4::8, 4::8] != 255)


def nearest(position, pixels):
    """The pixel nearest to a position, of two that are equally near the latter."""
    return min(range(pixels), key=lambda pixel: (abs(pixel - position), -pixel))


def stands_for(i, positions, pixels, align_corners):
    """Where in a row of pixels the middle of position i comes to lie when a map is resized to it."""
    if align_corners:
        return Fraction(i * (pixels - 1), positions - 1)
    return (i + Fraction(1, 2)) * Fraction(pixels, positions) - Fraction(1, 2)


@pytest.mark.parametrize('align_corners', [False, True])
@pytest.mark.parametrize('size', [(3, 4), (2, 8), (7, 5), (6, 8), (13, 17), (65, 33)])
@pytest.mark.parametrize('pixels', [(6, 8), (9, 20), (129, 64)])
def test_labels_at_another_size_as_plain_loops(size, pixels, align_corners):
    """Even ratios, odd ones, fractions, and maps that are larger than the image."""
    labels = torch.randint(0, 256, (2, *pixels))
    found = resize_labels(labels, size, align_corners)
    assert found.dtype is torch.int64
    rows, columns = (
        [nearest(stands_for(i, positions, side, align_corners), side) for i in range(positions)]
        for positions, side in zip(size, pixels)
    )
    for b in range(2):
        assert found[b].tolist() == [[labels[b, y, x].item() for x in columns] for y in rows]


@pytest.mark.parametrize('align_corners', [False, True])
def test_a_single_position_stands_for_the_middle(align_corners):
    assert resize_labels(torch.arange(7)[None, :, None], (1, 1), align_corners).item() == 3
    assert resize_labels(torch.arange(8)[None, :, None], (1, 1), align_corners).item() == 4


@pytest.mark.parametrize('ratio', [3, 4, 8, 32])
@pytest.mark.parametrize('align_corners', [False, True])
def test_a_label_is_where_the_heads_loss_puts_the_logit(ratio, align_corners):
    """The labels of a ramp, which logits that are the same ramp come to at the size of the image."""
    side = 6 * ratio + align_corners
    model = models.build(segmentors.pspnet(decode_head=dict(align_corners=align_corners)))
    ramp = torch.arange(side)
    positions = 6 + align_corners
    labels = resize_labels(ramp.expand(1, side, side), (positions, positions), align_corners)
    logits = labels[None].double()
    whole = resize_logits(logits, (side, side), model)[0, 0]
    inside = slice(ratio, side - ratio)  # the border of a map is continued as it is
    offset = 0.5 if ratio % 2 == 0 and not align_corners else 0.0
    torch.testing.assert_close(
        whole[inside, inside], (ramp[None, inside] + offset).expand(len(whole[inside]), -1).double()
    )


def test_the_decode_head_says_which_pixel_a_position_stands_for():
    labels = torch.arange(16).expand(16, 16)
    for align_corners, expected in ((False, [2, 6, 10, 14]), (True, [0, 5, 10, 15])):
        model = models.build(segmentors.pspnet(decode_head=dict(align_corners=align_corners)))
        assert labels_at(model, samples(labels), (4, 4))[0, 0].tolist() == expected
        masks = class_masks(model, samples(labels), (4, 4))
        assert masks[0, :, 0].float().argmax(0).tolist() == expected
        ignoring = models.build(
            segmentors.pspnet(decode_head=dict(align_corners=align_corners, ignore_index=expected[1]))
        )
        assert labeled(ignoring, samples(labels), (4, 4))[0, 0].tolist() == [True, False, True, True]


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
