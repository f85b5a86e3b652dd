import math

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from torch import nn

import mmkd
from mmkd.distillers.detection import icd
from mmkd.errors import ConfigError
from mmkd.taps import Taps
from mmkd.testing import detectors, models, segmentors
from mmkd.testing.batches import random_batch
from mmkd.testing.closed_form import closed_form_inputs

CLASSES, CHANNELS = 3, 32
MAPS = ((4, 6), (2, 3))
"""Of a batch of 32x48 pixels whose second image has 32x30."""
EXTENTS = torch.tensor([[[4, 6], [4, 4]], [[2, 3], [2, 2]]])
SIZES = torch.tensor([[48.0, 32.0], [30.0, 32.0]])
INSTANCES = icd.Instances(
    torch.tensor(
        [
            [[4.0, 2, 28, 30], [20, 4, 46, 20], [10, 10, 20, 28], [0, 0, 8, 6]],
            [[3, 5, 25, 31], [2, 2, 9, 30], [0, 0, 20, 20], [0, 0, 1, 1]],
        ]
    ),
    torch.tensor([[2, 0, 1, 2], [1, 0, 0, 0]]),
    torch.tensor([[[14.0, 18], [35, 10], [15, 20], [5, 3]], [[12, 20], [5, 14], [10, 10], [0, 0]]]),
    torch.tensor([[True, True, False, False], [True, False, False, False]]),
    torch.tensor([[True, True, True, True], [True, True, True, False]]),
)
IN_FLOAT64 = [icd.Instances(*(each.double() if each.is_floating_point() else each for each in INSTANCES))] + [
    SIZES.double()
]
AUX, DISTILL = {'encoder', 'decoder', 'predictor'}, {'value', 'student'}


def cells_and_inside(dtype=torch.float32):
    found = [icd.encode_cells(size, extent, CHANNELS, dtype) for size, extent in zip(MAPS, EXTENTS)]
    return [torch.cat(each, 1) for each in zip(*found)]


def test_the_values_of_the_authors_code():
    """Of pytorch_release (Apache-2.0, commit 5302863), with the same weights but for the order of sines and cosines."""
    parts = nn.ModuleDict(
        dict(
            encoder=icd.layers(CLASSES + 266, CHANNELS, CHANNELS, CHANNELS),
            decoder=icd.InstanceDecoder(CHANNELS),
            predictor=icd.predictor(CHANNELS),
            value=nn.Linear(16, CHANNELS),
        )
    )
    for each in parts.parameters():
        each.data.copy_(0.1 * closed_form_inputs(each.shape)[0])
    student, teacher = zip(*(closed_form_inputs((2, 16, *size), (2, CHANNELS, *size)) for size in MAPS))
    described, features = icd.describe(INSTANCES, SIZES, CLASSES), icd.tokens(teacher)
    assert described.abs().sum().item() == pytest.approx(1135.046631, rel=1e-5)
    found, shares = parts['decoder'](parts['encoder'](described), features, *cells_and_inside())
    losses = icd.auxiliary_losses(parts['predictor'](found), INSTANCES, SIZES)
    assert [each.item() for each in losses] == pytest.approx([0.7072709, 1.6896534], rel=1e-5)
    weights = torch.einsum('bhts,bt->bhs', shares, INSTANCES.real.float())
    values = [parts['value'](icd.tokens(student)), parts['decoder'].values(features)]
    distance = icd.conditional_distance(*(each.unflatten(2, (icd.HEADS, -1)) for each in values), weights)
    assert distance.item() == pytest.approx(1.8154911, rel=1e-5)


def test_the_description_by_hand():
    found = icd.describe(*IN_FLOAT64, CLASSES)
    assert found.shape == (2, 4, CLASSES + 256 + 10)
    for b, t in ((0, 1), (1, 0)):
        width, height = SIZES[b].tolist()
        x, y = INSTANCES.positions[b, t].tolist()
        expected = [float(c == INSTANCES.labels[b, t]) for c in range(CLASSES)]
        for place in (x / width, y / height):
            for wave in (math.sin, math.cos):
                expected += [wave(2 * math.pi * place / 10000 ** (2 * j / 128)) for j in range(64)]
        expected += [1.0, 0, 0, 0, 0] * 2  # narrower and lower than 64 pixels
        assert found[b, t].tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ('side', 'octave'), [(0, 0), (1, 0), (63, 0), (65, 1), (130, 2), (500, 3), (600, 4), (5000, 4)]
)
def test_sizes_by_octaves(side, octave):
    boxes = torch.tensor([[[10.0, 10, 10 + side, 10 + 70]]])
    instances = icd.Instances(boxes, torch.zeros(1, 1, dtype=torch.long), boxes[..., :2], *torch.ones(2, 1, 1).bool())
    found = icd.describe(instances, torch.tensor([[6000.0, 6000.0]]), 1)[0, 0, -10:]
    assert found.nonzero().flatten().tolist() == [octave, 5 + 1]


def test_cells_by_hand():
    cells, inside = icd.encode_cells((4, 6), EXTENTS[0], 8, torch.float64)
    for b in range(2):
        rows, columns = EXTENTS[0, b].tolist()
        for row in range(4):
            for column in range(6):
                place = 6 * row + column
                assert inside[b, place] == (row < rows and column < columns)
                expected = [
                    wave(2 * math.pi * where / 10000 ** (2 * j / 4))
                    for where in ((row + 1) / rows, (column + 1) / columns)
                    for wave in (math.sin, math.cos)
                    for j in range(2)
                ]
                assert cells[b, place].tolist() == pytest.approx(expected, abs=1e-9)


def test_auxiliary_losses_as_plain_loops():
    predicted = torch.randn(2, 4, 5, dtype=torch.float64)
    told, off = [], []
    for b in range(2):
        for t in range(4):
            if not INSTANCES.present[b, t]:
                continue
            z, *sides = predicted[b, t].tolist()
            real = INSTANCES.real[b, t].item()
            told.append(math.log(1 + math.exp(-z if real else z)))
            if real:
                (x, y), (x1, y1, x2, y2) = INSTANCES.positions[b, t].tolist(), INSTANCES.boxes[b, t].tolist()
                distances, whole = (x - x1, y - y1, x2 - x, y2 - y), SIZES[b].tolist() * 2
                extent = (x2 - x1, y2 - y1) * 2
                off.append(
                    sum(abs(a / (1 + math.exp(-p)) - d) / e for a, p, d, e in zip(whole, sides, distances, extent))
                )
    found = icd.auxiliary_losses(predicted, *IN_FLOAT64)
    assert [each.item() for each in found] == pytest.approx([sum(told) / len(told), sum(off) / len(off)], rel=1e-9)


def test_a_box_without_an_area_counts_as_one_of_a_pixel():
    boxes = torch.tensor([[[5.0, 5, 5, 5]]])
    instances = icd.Instances(boxes, torch.zeros(1, 1, dtype=torch.long), boxes[..., :2], *torch.ones(2, 1, 1).bool())
    found = icd.auxiliary_losses(torch.zeros(1, 1, 5), instances, torch.tensor([[10.0, 20.0]]))[1]
    assert found.item() == pytest.approx(0.5 * (10 + 20 + 10 + 20))


def test_distance_as_plain_loops():
    student, teacher = torch.randn(2, 2, 7, icd.HEADS, 4, dtype=torch.float64)
    weights = torch.rand(2, icd.HEADS, 7, dtype=torch.float64)
    weights[1, 3] = 0
    total = 0.0

    def normal(values):
        mean = sum(values) / len(values)
        variance = sum((each - mean) ** 2 for each in values) / len(values)
        return [(each - mean) / math.sqrt(variance + 1e-5) for each in values]

    for b in range(2):
        for h in range(icd.HEADS):
            above = below = 0.0
            for i in range(7):
                pairs = zip(*(normal(each[b, i, h].tolist()) for each in (student, teacher)))
                above += weights[b, h, i].item() * sum((s - t) ** 2 for s, t in pairs) / 4
                below += weights[b, h, i].item()
            total += above / max(below, 1e-6)
    assert icd.conditional_distance(student, teacher, weights).item() == pytest.approx(total / 16, rel=1e-9)
    assert icd.conditional_distance(teacher, teacher, weights) == 0


def test_distance_does_not_ask_for_scale_or_offset():
    student, teacher, weights = torch.randn(2, 7, 8, 4), torch.randn(2, 7, 8, 4), torch.rand(2, 8, 7)
    expected = icd.conditional_distance(student, teacher, weights)
    torch.testing.assert_close(
        icd.conditional_distance(3 * student + torch.randn(2, 7, 8, 1), teacher, 5 * weights),
        expected,
        rtol=1e-4,
        atol=0,
    )


def test_decoder_as_plain_loops():
    torch.manual_seed(0)
    decoder = icd.InstanceDecoder(CHANNELS).double()
    queries, features = torch.randn(2, 3, CHANNELS).double(), torch.randn(2, 30, CHANNELS).double()
    cells, inside = cells_and_inside(torch.float64)
    found, shares = decoder(queries, features, cells, inside)
    assert found.shape == (2, 3, CHANNELS)
    (q, k, v), (q0, k0, v0) = (
        each.chunk(3) for each in (decoder.attention.in_proj_weight, decoder.attention.in_proj_bias)
    )
    for b in range(2):
        seen = [i for i in range(30) if inside[b, i]]
        keys = {i: k @ (features[b, i] + decoder.position(cells[b, i])) + k0 for i in seen}
        values = {i: v @ features[b, i] + v0 for i in seen}
        torch.testing.assert_close(decoder.values(features)[b, seen], torch.stack(list(values.values())))
        for t in range(3):
            asked, answer = q @ queries[b, t] + q0, []
            for h in range(icd.HEADS):
                own = slice(4 * h, 4 * h + 4)
                expected = torch.stack([asked[own] @ keys[i][own] / 2 for i in seen]).softmax(0)
                torch.testing.assert_close(shares[b, h, t, seen], expected)
                answer.append(sum(share * values[i][own] for share, i in zip(expected, seen)))
            assert shares[b, :, t][:, ~inside[b]].abs().sum() == 0
            made = decoder.norms[0](queries[b, t] + decoder.attention.out_proj(torch.cat(answer)))
            torch.testing.assert_close(found[b, t], decoder.norms[1](made + decoder.hidden(made)))


@pytest.mark.parametrize(
    ('counts', 'most', 'totals'),
    [((2, 0), 300, (12, 1)), ((0, 0), 300, (1, 1)), ((4, 1), 10, (10, 6)), ((4, 12), 10, (10, 12))],
)
def test_as_many_fake_instances_as_in_the_authors_code(counts, most, totals):
    objects = max(1, *counts)
    boxes = torch.arange(2 * objects * 4).view(2, objects, 4).float()
    labels = torch.full((2, objects), 7)
    found = icd.draw_instances(boxes, labels, counts, SIZES, CLASSES, most)
    assert found.present.sum(1).tolist() == list(totals)
    assert found.real.sum(1).tolist() == list(counts)
    for b, count in enumerate(counts):
        assert found.real[b, :count].all()
        assert found.present[b, : totals[b]].all()
        assert torch.equal(found.boxes[b, :count], boxes[b, :count])
        assert (found.labels[b, :count] == 7).all()
    assert found.labels[~found.real].max() < CLASSES


def test_fake_instances_are_spread_over_the_image():
    torch.manual_seed(0)
    many = [
        icd.draw_instances(torch.zeros(2, 1, 4), torch.zeros(2, 1).long(), (0, 0), SIZES, CLASSES, 300)
        for _ in range(2000)
    ]
    boxes = torch.cat([each.boxes for each in many], 1) / SIZES.repeat(1, 2)[:, None]
    assert boxes.min() >= 0
    assert boxes.max() <= 1
    extent = boxes[..., 2:] - boxes[..., :2]
    assert 0.001 <= extent.min()
    assert extent.max() <= 0.6 + 1e-6
    assert (extent < 0.00201).double().mean() == pytest.approx(0.16, abs=0.02)  # one deviation below the mean
    center = (boxes[..., :2] + boxes[..., 2:]) / 2
    assert center.mean((0, 1)).tolist() == pytest.approx([0.5, 0.5], abs=0.02)
    narrow = center[extent < 0.00201]  # which are not clipped
    assert (narrow.min(), narrow.max()) == (pytest.approx(0.03, abs=1e-4), pytest.approx(0.97, abs=1e-4))
    labels = torch.cat([each.labels for each in many], 1)
    assert torch.bincount(labels.flatten()).div(labels.numel()).tolist() == pytest.approx([1 / 3] * 3, abs=0.04)
    positions = torch.cat([each.positions for each in many], 1) / SIZES[:, None]
    moved = (positions - center) / extent
    assert moved.mean() == pytest.approx(0, abs=0.01)
    moved = moved.abs()
    assert moved.max() == pytest.approx(0.3, abs=0.01)
    assert moved.mean() == pytest.approx(0.15, abs=0.01)


def distilled(student='retinanet', teacher='fcos', channels=24, **options):
    torch.manual_seed(0)  # of the trained parts
    model = mmkd.distill(
        models.build(getattr(detectors, student)(), seed=0),
        models.build(getattr(detectors, teacher)(channels), seed=1),
        dict(it=dict(type='ICD', **options)),
    )
    model.init_weights()
    return model.train()


def batch_of(model, objects=4):
    return model.data_preprocessor(random_batch(model, (2, 3, 96, 128), objects), True)


def taps_of(model, batch):
    with Taps(model, model.distillers.student_layers) as student:
        model.extract_feat(batch['inputs'])
    with torch.no_grad():
        return student, model.sources['teacher'](batch['inputs'], batch['data_samples'])


def looked_for(model, batch):
    """Of each level where objects are looked for, (B, 8, H, W)."""
    pairs = model.distillers['it'].levels(*taps_of(model, batch))
    sizes = [pair.teacher.shape[2:] for pair in pairs]
    _, weights = model.distillers['it'].look(pairs, icd.tokens([pair.teacher for pair in pairs]), batch['data_samples'])
    parts = weights.split([size.numel() for size in sizes], 2)
    return [part.unflatten(2, size) for part, size in zip(parts, sizes)]


def groups(model):
    parts = {name: list(getattr(model.distillers['it'], name).parameters()) for name in (*AUX, 'value')}
    parts['student'] = [each for each in (*model.backbone.parameters(), *model.neck.parameters()) if each.requires_grad]
    parts['head'] = list(model.bbox_head.parameters())
    parts['teacher'] = list(model.sources['teacher'].model.parameters())
    return parts


def trained_by(model, loss):
    """The groups of parameters that a loss changes; of these no part is left out but those that attention has no use of."""
    parts = groups(model)
    flat = [each for part in parts.values() for each in part if each.requires_grad]
    gradients = torch.autograd.grad(loss, flat, allow_unused=True, retain_graph=True)
    changed = {id(each) for each, gradient in zip(flat, gradients) if gradient is not None and gradient.any()}
    return {name for name, part in parts.items() if any(id(each) in changed for each in part)}


@pytest.mark.parametrize(
    ('options', 'by_loss', 'by_aux'),
    [
        (dict(), DISTILL, AUX),
        (dict(loss_weight=dict(type='constant', value=8.0, begin=1000)), {'value'}, AUX),
        (dict(loss_weight=0.0), set(), AUX),
        (dict(aux_weight=dict(type='constant', value=1.0, begin=1000)), DISTILL, set()),
    ],
    ids=['both', 'bypassed', 'without a weight', 'decoder at rest'],
)
def test_which_loss_trains_what(options, by_loss, by_aux):
    model = distilled(**options)
    found = model(**batch_of(model), mode='loss')
    assert trained_by(model, found['it.loss']) == by_loss
    assert trained_by(model, found['it.loss_aux']) == by_aux


def test_every_trained_part_learns():
    model = distilled()
    found = model(**batch_of(model), mode='loss')
    (found['it.loss'] + found['it.loss_aux']).backward()
    for name, parameter in model.distillers.named_parameters():
        # a bias of all keys changes no share
        gradient = parameter.grad.chunk(3)[0] if name.endswith('in_proj_bias') else parameter.grad
        assert gradient.any() or name.endswith('decoder.position.bias'), name


def test_the_linear_layer_learns_alone_as_strongly_as_later():
    losses = []
    for begin in (0, 1000):
        model = distilled(loss_weight=dict(type='constant', value=8.0, begin=begin))
        torch.manual_seed(0)
        losses.append(model(**batch_of(model), mode='loss')['it.loss'])
    assert losses[0] > 1
    torch.testing.assert_close(losses[0], losses[1])


def test_one_step_changes_the_weights_as_two_optimizers_do():
    """The authors' two, each over its own networks, here both of SGD."""
    ends = []
    for apart in (False, True):
        model = distilled(loss_weight=dict(type='constant', value=8.0, begin=1))
        own, other = (
            list(model.distillers.parameters()),
            [p for n, p in model.named_parameters() if 'distillers' not in n],
        )
        sgd = [
            torch.optim.SGD(each, lr=rate, momentum=0.9)
            for each, rate in (((own, 0.02), (other, 0.01)) if apart else ())
        ] or [torch.optim.SGD([dict(params=own, lr=0.02), dict(params=other, lr=0.01)], momentum=0.9)]
        for step in range(3):
            model.distillers['it'].loss_weight.iteration = step
            torch.manual_seed(step)
            total, _ = model.parse_losses(model(**batch_of(model), mode='loss'))
            for each in sgd:
                each.zero_grad()
            total.backward()
            for each in sgd:
                each.step()
        ends.append({name: value.clone() for name, value in model.state_dict().items()})
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name]), name


def test_a_config_gives_the_decoder_a_rate_of_its_own():
    model = distilled()
    wrapper = build_optim_wrapper(
        model,
        dict(
            type='OptimWrapper',
            optimizer=dict(type='SGD', lr=0.01, weight_decay=1e-4),
            paramwise_cfg=dict(custom_keys={'distillers.it': dict(lr_mult=0.1)}),
            clip_grad=dict(type='value', clip_value=1.0),
        ),
    )
    rates = {id(p): group['lr'] for group in wrapper.optimizer.param_groups for p in group['params']}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert rates[id(parameter)] == pytest.approx(0.001 if 'distillers' in name else 0.01), name


def test_the_decoder_learns_to_tell_objects_from_fake_instances_by_sgd():
    """One batch again and again, in which fakes and positions are always others."""
    model = distilled(channels=32, loss_weight=0.0)
    batch, (first, last) = batch_of(model, 6), ([], [])
    optimizer = torch.optim.SGD(model.distillers.parameters(), lr=0.01, momentum=0.9)
    student, teacher = taps_of(model, batch)
    for step in range(100):
        torch.manual_seed(step)
        found = model.distillers['it'](student, teacher, batch['data_samples'])
        optimizer.zero_grad()
        found['loss_aux'].backward()
        optimizer.step()
        (first if step < 10 else last if step >= 90 else []).append(found['identification'])
    of_one_in_six = -(math.log(1 / 6) / 6 + math.log(5 / 6) * 5 / 6)  # 0.4506, by knowing nothing of an instance
    assert torch.stack(first).mean() > of_one_in_six
    assert torch.stack(last).mean() < 0.9 * of_one_in_six


def test_without_objects_the_losses_are_finite_and_of_fake_instances():
    model = distilled()
    found = model(**batch_of(model, objects=0), mode='loss')
    assert found['it.loss'] == 0
    assert found['it.localization'] == 0
    assert found['it.identification'] > 0
    (found['it.loss'] + found['it.loss_aux']).backward()
    assert all(torch.isfinite(each.grad).all() for each in model.distillers.parameters())


def test_fake_instances_and_what_is_not_there_do_not_count_for_the_student():
    model = distilled()
    batch = batch_of(model)
    weights = sum(each.sum((2, 3)) for each in looked_for(model, batch))
    counts = [len(each.gt_instances) for each in batch['data_samples']]
    for of_image, count in zip(weights, counts):
        torch.testing.assert_close(of_image, torch.full((icd.HEADS,), float(count)))


def test_nobody_looks_into_the_padding():
    model = distilled()
    data = random_batch(model, (2, 3, 96, 128), 4)
    data['inputs'][1] = data['inputs'][1][:, :64, :80]
    data['data_samples'][1].set_metainfo(dict(img_shape=(64, 80)))
    batch = model.data_preprocessor(data, True)
    for part in looked_for(model, batch):
        of_image, (height, width) = part[1], part.shape[2:]
        rows, columns = math.ceil(64 * height / 96), math.ceil(80 * width / 128)
        assert (of_image[:, :rows, :columns] > 0).all()
        assert of_image[:, rows:].sum() == of_image[:, :, columns:].sum() == 0


@pytest.mark.parametrize('student', ['faster_rcnn', 'gfl'])
def test_detectors_of_any_family_and_width(student):
    model = distilled(student, 'faster_rcnn', channels=32)
    found = model(**batch_of(model), mode='loss')
    assert all(torch.isfinite(found[f'it.{key}']) for key in ('loss', 'loss_aux'))
    assert model.distillers['it'].value.weight.shape == (32, 16)


@pytest.mark.parametrize(
    ('options', 'channels', 'message'),
    [
        (dict(max_instances=0), 24, 'max_instances=0: expected a whole number of at least 1'),
        (dict(loss_weight=-1.0), 24, 'loss_weight'),
        (dict(aux_weight='x'), 24, 'aux_weight'),
        (dict(), 20, "the teacher's levels have 20 channels; ICD needs a multiple of 8"),
        (dict(layer='backbone'), 24, r"the student's levels have \[.*\] channels; ICD needs as many on all levels"),
    ],
)
def test_what_cannot_work_is_an_error(options, channels, message):
    with pytest.raises(ConfigError, match=message):
        distilled(channels=channels, **options)


def test_segmentors_are_refused():
    networks = [models.build(segmentors.pspnet(), seed=seed) for seed in range(2)]
    with pytest.raises(ConfigError, match='PSPNet|EncoderDecoder predicts no boxes of classes'):
        mmkd.distill(*networks, dict(it=dict(type='ICD')))


def test_pictures_show_where_objects_are_looked_for():
    model = distilled().eval()
    batch = batch_of(model)
    with torch.no_grad():
        student, teacher = taps_of(model, batch)
        found = model.distillers['it'].pictures(student, teacher, batch['data_samples'])
    assert [tuple(each.shape) for each in found.values()] == [(2, *each.shape[2:]) for each in student['neck']]
    counts = [float(len(each.gt_instances)) for each in batch['data_samples']]
    assert sum(each.sum((1, 2)) for each in found.values()).tolist() == pytest.approx(counts, rel=1e-4)
