import math

import pytest
import torch
from mmengine.structures import InstanceData

from mmkd.distillers.detection import fgd
from mmkd.distillers.detection.fgd import FGD, GlobalContext
from mmkd.errors import ConfigError
from mmkd.hosts.running import probe
from mmkd.taps import Taps
from mmkd.testing import detectors, models

SHAPE = (96, 128)
# the padded input is larger than the second image
METAS = [dict(img_shape=SHAPE, batch_input_shape=SHAPE), dict(img_shape=(80, 100), batch_input_shape=SHAPE)]
BOXES = [
    torch.tensor([[8.0, 8.0, 56.0, 48.0], [30.0, 20.0, 45.0, 33.0], [100.0, 60.0, 128.0, 96.0]]),
    torch.tensor([[3.0, 5.0, 9.0, 7.0]]),
]


def features(seed=0, channels=6, size=(6, 8), scale=1.0):
    random = torch.Generator().manual_seed(seed)
    return scale * torch.randn(2, 2, channels, *size, generator=random, dtype=torch.float64)


def padded(boxes):
    most = max(1, *(len(each) for each in boxes))
    tensor, valid = torch.zeros(len(boxes), most, 4), torch.zeros(len(boxes), most, dtype=torch.bool)
    for image, each in enumerate(boxes):
        tensor[image, : len(each)], valid[image, : len(each)] = each, True
    return tensor, valid


def softmax(values):
    exponentials = [math.exp(each - max(values)) for each in values]
    return [each / sum(exponentials) for each in exponentials]


def attention_plain_loops(feature, tau):
    """Of one image, (C, H, W): position to attention, and attention of each channel."""
    channels, height, width = feature.shape
    cells = [(y, x) for y in range(height) for x in range(width)]
    means = [sum(abs(feature[c, y, x].item()) for c in range(channels)) / channels for y, x in cells]
    spatial = softmax([each / tau for each in means])
    sizes = [sum(abs(feature[c, y, x].item()) for y, x in cells) / len(cells) for c in range(channels)]
    channel = softmax([each / tau for each in sizes])
    return {cell: len(cells) * each for cell, each in zip(cells, spatial)}, [channels * each for each in channel]


def masks_plain_loops(boxes, size, shape):
    """Of one image: (cell to scale) of foreground and background."""
    height, width = size
    cell_height, cell_width = shape[0] / height, shape[1] / width
    areas = {(y, x): [] for y in range(height) for x in range(width)}
    for x1, y1, x2, y2 in boxes.tolist():
        touched = [
            (y, x)
            for y, x in areas
            if x1 < (x + 1) * cell_width and x2 > x * cell_width and y1 < (y + 1) * cell_height and y2 > y * cell_height
        ]
        for cell in touched:
            areas[cell].append(len(touched))
    background = [cell for cell, each in areas.items() if not each]
    return (
        {cell: 1 / min(each) if each else 0.0 for cell, each in areas.items()},
        {cell: 1 / len(background) if cell in background else 0.0 for cell in areas},
    )


@pytest.mark.parametrize('tau', [0.5, 0.8])
def test_attention_as_plain_loops(tau):
    feature = features()[0]
    spatial, channel = fgd.attention(feature, tau)
    for image in range(2):
        positions, channels = attention_plain_loops(feature[image], tau)
        assert channel[image].tolist() == pytest.approx(channels, rel=1e-6)
        for (y, x), expected in positions.items():
            assert spatial[image, y, x].item() == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(spatial.mean((1, 2)), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(channel.mean(1), torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize('size', [(12, 16), (6, 8), (3, 4)])
def test_scale_masks_are_of_the_smallest_object(size):
    masks = fgd.scale_masks(*padded(BOXES), size, SHAPE)
    for image in range(2):
        expected = masks_plain_loops(BOXES[image], size, SHAPE)
        for mask, cells in zip(masks, expected):
            found = {(y, x): mask[image, y, x].item() for y, x in cells}
            assert found == pytest.approx(cells, rel=1e-6)
    assert masks[0][0].unique().numel() >= 3


def test_masks_of_an_image_without_objects_and_of_one_without_background():
    boxes, valid = padded([torch.zeros(0, 4), torch.tensor([[-5.0, 0.0, 130.0, 96.0]])])
    foreground, background = fgd.scale_masks(boxes, valid, (6, 8), SHAPE)
    assert (foreground[0] == 0).all()
    torch.testing.assert_close(background[0], torch.full((6, 8), 1 / 48))
    torch.testing.assert_close(foreground[1], torch.full((6, 8), 1 / 48))
    assert (background[1] == 0).all()


@pytest.mark.parametrize('tau', [0.5, 0.8])
def test_focal_and_attention_losses_as_plain_loops(tau):
    student, teacher = features()
    masks = fgd.scale_masks(*padded(BOXES), (6, 8), SHAPE)
    expected = [0.0, 0.0, 0.0]
    for image in range(2):
        spatial, channel = attention_plain_loops(teacher[image], tau)
        own_spatial, own_channel = attention_plain_loops(student[image], tau)
        expected[2] += sum(abs(spatial[cell] - own_spatial[cell]) for cell in spatial) / 2
        expected[2] += sum(abs(t - s) for t, s in zip(channel, own_channel)) / 2
        for kind, scales in enumerate(masks_plain_loops(BOXES[image], (6, 8), SHAPE)):
            for (y, x), scale in scales.items():
                for c in range(6):
                    difference = (teacher[image, c, y, x] - student[image, c, y, x]).item()
                    expected[kind] += scale * spatial[y, x] * channel[c] * difference**2 / 2
    found = [*fgd.focal_losses(student, teacher, *masks, tau)]
    found.append(fgd.attention_loss(student, teacher, tau))
    assert [each.item() for each in found] == pytest.approx(expected, rel=1e-6)
    assert min(expected) > 0


def context_plain_loops(block, feature):
    """GlobalContext of one image, (C, H, W), as nested lists."""
    channels, height, width = feature.shape
    cells = [(y, x) for y in range(height) for x in range(width)]
    key = block.key.weight.flatten().tolist()
    share = softmax([sum(key[c] * feature[c, y, x].item() for c in range(channels)) for y, x in cells])
    context = [sum(p * feature[c, y, x].item() for p, (y, x) in zip(share, cells)) for c in range(channels)]

    def linear(layer, values):
        weight, bias = layer.weight.tolist(), layer.bias.tolist()
        return [sum(w * v for w, v in zip(row, values)) + b for row, b in zip(weight, bias)]

    first, norm, _, last = block.transform
    hidden = linear(first, context)
    mean = sum(hidden) / len(hidden)
    deviation = math.sqrt(sum((each - mean) ** 2 for each in hidden) / len(hidden) + norm.eps)
    hidden = [
        max(0.0, (each - mean) / deviation * w + b)
        for each, w, b in zip(hidden, norm.weight.tolist(), norm.bias.tolist())
    ]
    added = linear(last, hidden)
    return [
        [[feature[c, y, x].item() + added[c] for x in range(width)] for y in range(height)] for c in range(channels)
    ]


def test_the_global_loss_as_plain_loops():
    student, teacher = features(size=(3, 4))
    torch.manual_seed(0)
    blocks = [GlobalContext(6).double() for _ in range(2)]
    for block in blocks:
        for parameter in block.parameters():
            torch.nn.init.normal_(parameter)
    expected = 0.0
    for image in range(2):
        s, t = (torch.tensor(context_plain_loops(b, f[image])) for b, f in zip(blocks, (student, teacher)))
        expected += sum((b - a) ** 2 for a, b in zip(s.flatten().tolist(), t.flatten().tolist())) / 2
    assert fgd.global_loss(blocks[0](student), blocks[1](teacher)).item() == pytest.approx(expected, rel=1e-6)


def test_a_new_context_block_changes_nothing():
    feature = features()[0].float()
    assert torch.equal(GlobalContext(6)(feature), feature)


def tapped(student, teacher, distiller, images):
    taps = []
    for model, layers in ((student, distiller.student_layers), (teacher, distiller.teacher_layers)):
        with Taps(model, layers) as read:
            model.extract_feat(images)
        taps.append(read)
    return taps


def ready(distiller, student, teacher):
    distiller.setup(probe(student, distiller.student_layers), probe(teacher, distiller.teacher_layers))
    return distiller


def samples(boxes=BOXES, metas=METAS):
    from mmdet.structures import DetDataSample

    found = []
    for each, meta in zip(boxes, metas):
        sample = DetDataSample(metainfo=meta)
        sample.gt_instances = InstanceData(bboxes=each, labels=torch.zeros(len(each), dtype=torch.long))
        found.append(sample)
    return found


NONE = [torch.zeros(0, 4), torch.zeros(0, 4)]
KEYS = ['loss_foreground', 'loss_background', 'loss_attention', 'loss_global']


@pytest.mark.parametrize('boxes', [BOXES, NONE])
def test_all_losses_are_zero_for_equal_networks(boxes):
    student, teacher = (models.build(detectors.retinanet(), seed=0) for _ in range(2))
    distiller = ready(FGD(), student, teacher)
    losses = distiller(*tapped(student, teacher, distiller, torch.randn(2, 3, *SHAPE)), samples(boxes))
    assert {name: loss.item() for name, loss in losses.items()} == dict.fromkeys(KEYS, 0.0)


def test_losses_are_weighted_sums_over_levels_on_the_padded_input():
    student, teacher = (models.build(detectors.retinanet(), seed=seed) for seed in (0, 1))
    weights = dict(foreground_weight=2.0, background_weight=3.0, attention_weight=5.0, global_weight=7.0)
    distiller = ready(FGD(**weights, tau=0.8), student, teacher)
    taps = tapped(student, teacher, distiller, torch.randn(2, 3, *SHAPE))
    losses = distiller(*taps, samples())
    expected = torch.zeros(4)
    for s, t in zip(taps[0]['neck'], taps[1]['neck'], strict=True):
        masks = fgd.scale_masks(*padded(BOXES), s.shape[2:], SHAPE)
        level = (*fgd.focal_losses(s, t, *masks, 0.8), fgd.attention_loss(s, t, 0.8), fgd.global_loss(s, t))
        expected += torch.stack(level).detach()
    for key, weight, value in zip(KEYS, weights.values(), expected):
        torch.testing.assert_close(losses[key].detach(), weight * value)


@pytest.mark.parametrize('boxes', [BOXES, NONE])
@pytest.mark.parametrize('detector', [detectors.retinanet, detectors.faster_rcnn])
def test_gradients_reach_student_adapters_and_both_blocks_and_never_the_teacher(boxes, detector):
    student = models.build(detector(), seed=0)
    teacher = models.build(detector(channels=24), seed=1)
    distiller = ready(FGD(), student, teacher)
    for blocks in (distiller.student_contexts, distiller.teacher_contexts):
        for block in blocks:  # after a first step
            torch.nn.init.normal_(block.transform[-1].weight, std=0.1)
    losses = distiller(*tapped(student, teacher, distiller, torch.randn(2, 3, *SHAPE)), samples(boxes))
    assert list(losses) == KEYS
    assert all(each.requires_grad and torch.isfinite(each) for each in losses.values())
    assert (losses['loss_foreground'] == 0) == (boxes is NONE)
    sum(losses.values()).backward()
    levels = 3 if detector is detectors.retinanet else 5
    assert len(list(distiller.parameters())) == levels * (2 + 2 * 7)
    assert all(each.grad.abs().sum() > 0 for each in distiller.parameters())
    assert student.neck.lateral_convs[0].conv.weight.grad.abs().sum() > 0
    assert all(torch.isfinite(each.grad).all() for each in student.parameters() if each.grad is not None)
    assert all(each.grad is None for each in teacher.parameters())


def test_every_trained_part_takes_part_in_the_first_step():
    """Where W2 is still 0, and under a weight of 0: what DDP needs."""
    student, teacher = (models.build(detectors.retinanet(), seed=seed) for seed in (0, 1))
    distiller = ready(FGD(global_weight=0.0), student, teacher)
    losses = distiller(*tapped(student, teacher, distiller, torch.randn(2, 3, *SHAPE)), samples(NONE))
    sum(losses.values()).backward()
    assert all(each.grad is not None for each in distiller.parameters())


def test_the_value_does_not_depend_on_the_number_of_images():
    student, teacher = (models.build(detectors.retinanet(), seed=seed) for seed in (0, 1))
    distiller = ready(FGD(), student, teacher)
    image = torch.randn(1, 3, *SHAPE)
    one = distiller(*tapped(student, teacher, distiller, image), samples(BOXES[:1], METAS[:1]))
    three = distiller(
        *tapped(student, teacher, distiller, image.repeat(3, 1, 1, 1)), samples(BOXES[:1] * 3, METAS[:1] * 3)
    )
    for name in KEYS:
        torch.testing.assert_close(three[name], one[name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize('options', [dict(tau=0.0), dict(match='size'), dict(global_weight='1')])
def test_options_out_of_range_are_errors(options):
    message = 'weight' if 'global_weight' in options else next(iter(options))
    with pytest.raises(ConfigError, match=message):
        FGD(**options)
