import math

import pytest
import torch
import torch.nn.functional as F

from mmkd.distill import distill
from mmkd.distillers.memory import ClassMemory
from mmkd.distillers.segmentation.cirkd import CIRKD, batch_loss, class_means, draw_pixels, memory_loss, pool_labeled
from mmkd.errors import ConfigError
from mmkd.hosts.running import probe
from mmkd.taps import Taps
from mmkd.testing import models, segmentors
from mmkd.testing.batches import random_batch

FEATURE = 'decode_head.dropout:input'


def softmax(values):
    powers = [math.exp(value - max(values)) for value in values]
    return [power / sum(powers) for power in powers]


def divergence(student, teacher):
    return sum(p * math.log(p / q) for p, q in zip(softmax(teacher), softmax(student)))


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def positions(feature):
    """(B, C, H, W) as a list of images of positions of channels."""
    return feature.flatten(2).transpose(1, 2).tolist()


def random_masks(batch=2, classes=4, height=3, width=4):
    """(B, K, H, W): every position a class or none; the last class is in no image."""
    labels = torch.randint(0, classes, (batch, 1, height, width))
    masks = labels == torch.arange(classes)[:, None, None]
    masks[:, -1] = False
    return masks


def batch_loops(student, teacher, valid, tau):
    """The formula, pair by pair, in float64."""
    student, teacher, valid = positions(student), positions(teacher), valid.flatten(1).tolist()
    images = [i for i, each in enumerate(valid) if any(each)]
    total = 0.0
    for i in images:
        for j in images:
            rows = 0.0
            for a, counts in enumerate(valid[i]):
                if counts:
                    row = [
                        [cosine(f[i][a], f[j][b]) / tau for b, there in enumerate(valid[j]) if there]
                        for f in (student, teacher)
                    ]
                    rows += divergence(*row)
            total += rows / sum(valid[i])
    return total / len(images) ** 2


@pytest.mark.parametrize('tau', [0.1, 1.0])
@pytest.mark.parametrize('part', [0.3, 1.0])
def test_relations_within_the_batch_as_plain_loops(tau, part):
    """With other numbers of channels, images of other labelled parts, and one without labels."""
    student, teacher = torch.randn(3, 3, 3, 4, dtype=torch.float64), torch.randn(3, 7, 3, 4, dtype=torch.float64)
    valid = torch.rand(3, 3, 4) < torch.tensor([part, 1.0, 0.0 if part < 1 else 1.0])[:, None, None]
    found = batch_loss(student, teacher, valid, tau).item()
    assert found == pytest.approx(batch_loops(student, teacher, valid, tau), rel=1e-6)


@pytest.mark.parametrize('entries', [0, 1, 5, 9])
def test_relations_to_the_memory_as_plain_loops(entries):
    student, teacher = torch.randn(2, 2, 6, 3, 4, dtype=torch.float64)
    memory = torch.randn(9, 6, dtype=torch.float64)
    there = torch.zeros(9, dtype=torch.bool)
    there[torch.randperm(9)[:entries]] = True
    valid = torch.rand(2, 3, 4) < 0.6
    total = 0.0
    for s_image, t_image, image in zip(positions(student), positions(teacher), valid.flatten(1).tolist()):
        for s, t, counts in zip(s_image, t_image, image):
            if counts and entries:
                total += divergence(*([cosine(f, m) / 0.1 for m in memory[there].tolist()] for f in (s, t)))
    found = memory_loss(student, teacher, valid, memory, there, 0.1).item()
    assert found == pytest.approx(total / valid.sum().item(), rel=1e-6, abs=1e-12)


def loss_functions(channels=3):
    memory, there = torch.randn(9, channels), torch.arange(9) < 7
    return [batch_loss, lambda student, teacher, valid: memory_loss(student, teacher, valid, memory, there)]


@pytest.mark.parametrize('which', [0, 1])
def test_properties_of_both_losses(which):
    """Ignored positions, scale, equal inputs, all ignored, a batch of one, channels_last, extremes, gradients."""
    loss = loss_functions()[which]
    student, teacher = torch.randn(2, 2, 3, 4, 5)
    valid = torch.rand(2, 4, 5) < 0.7
    expected = loss(student, teacher, valid)
    assert expected > 0
    noisy = [each + 50 * ~valid[:, None] * torch.randn_like(each) for each in (student, teacher)]
    torch.testing.assert_close(loss(*noisy, valid), expected)
    torch.testing.assert_close(loss(3 * student, 0.5 * teacher, valid), expected)
    last = [each.contiguous(memory_format=torch.channels_last) for each in (student, teacher)]
    torch.testing.assert_close(loss(*last, valid), expected)
    assert loss(student, student, valid).item() == pytest.approx(0, abs=1e-6)
    one = loss(student[:1], teacher[:1], valid[:1])
    assert torch.isfinite(one)
    repeated = loss(student[:1].repeat(3, 1, 1, 1), teacher[:1].repeat(3, 1, 1, 1), valid[:1].repeat(3, 1, 1))
    torch.testing.assert_close(repeated, one)

    for image, ignored in (
        (student + 200 * (torch.arange(5) == 2), ~valid & False),
        (student, valid),
        (0 * student, valid),
    ):
        image = image.clone().requires_grad_()
        target = teacher.clone().requires_grad_()
        found = loss(image, target, valid & ~ignored)
        found.backward()
        assert torch.isfinite(found)
        assert torch.isfinite(image.grad).all()
        assert image.grad.any() == (not ignored.any())
        assert (found == 0) == ignored.any()
        assert target.grad is None


def test_an_empty_memory_is_a_differentiable_zero():
    student = torch.randn(2, 3, 4, 5, requires_grad=True)
    valid = torch.ones(2, 4, 5, dtype=torch.bool)
    loss = memory_loss(student, torch.randn(2, 3, 4, 5), valid, torch.zeros(9, 3), torch.zeros(9, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert not student.grad.any()


def test_entries_that_are_not_there_do_not_matter():
    student, teacher, valid = *torch.randn(2, 2, 3, 4, 5), torch.ones(2, 4, 5, dtype=torch.bool)
    memory, there = torch.randn(9, 3), torch.arange(9) % 2 == 0
    found = memory_loss(student, teacher, valid, memory, there)
    torch.testing.assert_close(found, memory_loss(student, teacher, valid, memory[there], there[there]))


@pytest.mark.parametrize(('most', 'window'), [(35, 1), (34, 2), (12, 2), (11, 3), (6, 3), (4, 4), (2, 5), (1, 7)])
def test_pooling_as_plain_loops(most, window):
    """Of a map of 5x7: windows at the edges are cut, ignored positions left out."""
    feature, valid = torch.randn(2, 3, 5, 7, dtype=torch.float64), torch.rand(2, 5, 7) < 0.4
    pooled, there = pool_labeled(feature, valid, most)
    assert pooled.shape[2:] == (math.ceil(5 / window), math.ceil(7 / window))
    assert pooled[0, 0].numel() <= most
    if window == 1:
        assert pooled is feature
        assert there is valid
        return
    for b in range(2):
        for y in range(pooled.shape[2]):
            for x in range(pooled.shape[3]):
                cells = (b, slice(y * window, (y + 1) * window), slice(x * window, (x + 1) * window))
                number = int(valid[cells].sum())
                assert there[b, y, x] == (number > 0)
                expected = (feature[b][(slice(None), *cells[1:])] * valid[cells]).sum((1, 2)) / max(number, 1)
                torch.testing.assert_close(pooled[b, :, y, x], expected)


def test_the_published_choices_of_pooling():
    """For two images of a process: none for 64x64, 2x2 for 64x128, 4x4 for 256x256."""
    most = CIRKD().max_positions // 2
    for size, pooled in (((64, 64), (64, 64)), ((64, 128), (32, 64)), ((256, 256), (64, 64))):
        found, _ = pool_labeled(torch.zeros(1, 1, *size), torch.ones(1, *size, dtype=torch.bool), most)
        assert found.shape[2:] == pooled


@pytest.mark.parametrize('number', [2, 16, 40])
def test_pixels_are_drawn_of_their_own_class_and_image_and_none_twice(number):
    """As many as there are, if these are few; 40 is more than an image has."""
    masks = random_masks(batch=3, classes=4, height=5, width=6)
    embedding = torch.arange(90.0).view(3, 1, 5, 6)  # says which position it is
    rows, there = draw_pixels(embedding, masks, number)
    assert rows.shape == (3 * number, 4, 1)
    assert there.shape == (3 * number, 4)
    for b in range(3):
        for k in range(4):
            own = slice(b * number, (b + 1) * number)
            drawn = rows[own, k, 0][there[own, k]].tolist()
            of_class = set(embedding[b, 0][masks[b, k]].tolist())
            assert len(drawn) == len(set(drawn)) == min(number, len(of_class))
            assert set(drawn) <= of_class
    again, _ = draw_pixels(embedding, masks, number)
    assert not torch.equal(rows, again)


def test_every_pixel_of_a_class_is_drawn_as_often():
    masks = torch.zeros(1, 2, 4, 5, dtype=torch.bool)
    masks[0, 1, 1:3] = True
    embedding = torch.arange(20.0).view(1, 1, 4, 5)
    drawn = torch.cat([draw_pixels(embedding, masks, 2)[0][:, 1, 0] for _ in range(500)])
    counts = drawn.long().bincount(minlength=20)[5:15]
    assert counts.sum() == 1000
    assert counts.min() > 60  # 100 are expected


def test_class_means_as_plain_loops():
    embedding, masks = torch.randn(2, 3, 5, 6, dtype=torch.float64), random_masks(2, 4, 5, 6)
    means, there = class_means(embedding, masks)
    assert not there[:, -1].any()
    for b in range(2):
        for k in range(4):
            own = embedding[b][:, masks[b, k]]
            assert there[b, k] == (own.shape[1] > 0)
            expected = own.mean(1) / own.mean(1).norm() if own.shape[1] else torch.zeros(3).double()
            torch.testing.assert_close(means[b, k], expected)


def pair(tmp_path, family='deeplabv3', teacher=None, **options):
    """A segmentor that is distilled, its teacher loaded; small queues."""
    config = teacher or getattr(segmentors, family)(24, base=16)
    checkpoint = models.save_weights(config, tmp_path / 'teacher.pth')
    student = models.build(getattr(segmentors, family)(), seed=0)
    options = (
        dict(
            pixel_contrast_size=190,
            region_contrast_size=38,
            pixel_memory_size=30,
            region_memory_size=8,
            pixels_per_image=4,
        )
        | options
    )
    model = distill(student, dict(config=config, checkpoint=checkpoint), dict(cirkd=dict(type='CIRKD', **options)))
    model.sources['teacher'].load()
    return model.train()


def step(model, objects=4, seed=0, images=2):
    data = model.data_preprocessor(random_batch(model, (images, 3, 64, 96), objects, seed), True)
    return {key[6:]: loss for key, loss in model(**data, mode='loss').items() if key.startswith('cirkd.')}


@pytest.mark.parametrize(
    ('family', 'options'),
    [('deeplabv3', {}), ('pspnet', dict(max_positions=50)), ('segformer', dict(layer='decode_head.fusion_conv'))],
)
def test_a_training_step(family, options, tmp_path):
    """The memory's terms are 0 in the first step alone, and without labels all of them are; projections always take part."""
    model = pair(tmp_path, family, **options)
    for index, objects in enumerate((4, 4, 0)):
        model.zero_grad()
        losses = step(model, objects, index)
        assert list(losses) == ['loss_batch', 'loss_pixel', 'loss_region']
        assert all(torch.isfinite(loss) for loss in losses.values())
        assert [bool(loss > 0) for loss in losses.values()] == [[True, False, False], [True] * 3, [False] * 3][index]
        sum(losses.values()).backward()
        for name, parameter in model.distillers.named_parameters():
            assert torch.isfinite(parameter.grad).all(), name
            assert parameter.grad.any() == (index == 1), name
        gradient = next(model.backbone.parameters()).grad
        assert torch.isfinite(gradient).all()
        assert gradient.any() == (objects > 0)
    assert {name for name, _ in model.distillers.cirkd.named_parameters()} == {
        'projection.0.conv.weight', 'projection.0.norm.weight', 'projection.0.norm.bias', 'projection.1.weight'
    }  # fmt: skip
    assert all(each.grad is None for each in model.sources['teacher'].model.parameters())


def test_a_class_queue_has_pixels_of_that_class_alone(tmp_path):
    """Each entry is the teacher's embedding of a pixel with that label; regions are means of a class in an image."""
    model = pair(tmp_path, pixel_memory_size=40)
    pixels, regions = {k: [] for k in range(19)}, {k: [] for k in range(19)}
    for seed in range(3):
        step(model, seed=seed)
        data = model.data_preprocessor(random_batch(model, (2, 3, 64, 96), seed=seed), True)
        embedding = F.normalize(model.sources['teacher'](data['inputs'], None)[FEATURE][0], dim=1)
        for feature, sample in zip(embedding, data['data_samples']):
            stride = 64 // feature.shape[1]
            labels = sample.gt_sem_seg.data[0, stride // 2 :: stride, stride // 2 :: stride]
            for k in range(19):
                of_class = feature[:, labels == k].t()
                if len(of_class):
                    pixels[k].append(of_class)
                    regions[k].append(F.normalize(of_class.mean(0), dim=0)[None])
    for queues, expected in (
        (model.distillers.cirkd.pixel_queues, pixels),
        (model.distillers.cirkd.region_queues, regions),
    ):
        assert sum(queues.count > 0) >= 5
        for k in range(19):
            number = queues.count[k].item()
            assert number == sum(min(len(each), 4) for each in expected[k])
            if number:
                distance = torch.cdist(queues.keys[k, : min(number, 40)], torch.cat(expected[k]))
                assert distance.amin(1).max() < 1e-5
            assert not queues.keys[k, number:].any()


def test_the_memorys_losses_are_of_what_earlier_steps_left(tmp_path):
    """With one entry of each class drawn from queues of one, the contrast set is known."""
    model = pair(
        tmp_path,
        pixel_contrast_size=1,
        region_contrast_size=1,
        pixel_memory_size=1,
        region_memory_size=1,
        batch_weight=5.0,
        pixel_weight=2.0,
        region_weight=3.0,
        tau=0.2,
    )
    step(model)
    distiller = model.distillers.cirkd
    kept = [
        (queues.keys[:, 0].clone(), queues.count > 0) for queues in (distiller.pixel_queues, distiller.region_queues)
    ]
    data = model.data_preprocessor(random_batch(model, (2, 3, 64, 96), seed=1), True)
    with Taps(model, distiller.student_layers) as student:
        losses = model(**data, mode='loss')
    teacher = model.sources['teacher'](data['inputs'], None)
    (s,), (t,) = student[FEATURE], teacher[FEATURE]
    labels = torch.cat([sample.gt_sem_seg.data for sample in data['data_samples']])[:, 8::16, 8::16]
    valid = labels != 255
    torch.testing.assert_close(losses['cirkd.loss_batch'], 5 * batch_loss(s, t, valid, 0.2))
    for key, weight, (memory, there) in zip(('loss_pixel', 'loss_region'), (2.0, 3.0), kept):
        expected = weight * memory_loss(distiller.projection(s), t, valid, memory, there, 0.2)
        assert expected > 0
        torch.testing.assert_close(losses[f'cirkd.{key}'], expected)


def test_how_many_pixels_and_regions_are_drawn_of_each_class(tmp_path, monkeypatch):
    """One more than their part of the whole."""
    drawn = {}
    draw = ClassMemory.draw
    monkeypatch.setattr(
        ClassMemory, 'draw', lambda self, number: drawn.update({id(self): number}) or draw(self, number)
    )
    model = pair(tmp_path, pixel_contrast_size=190, region_contrast_size=38)
    step(model)
    cirkd = model.distillers.cirkd
    assert drawn == {id(cirkd.pixel_queues): 11, id(cirkd.region_queues): 3}


@pytest.mark.parametrize('max_positions', [8192, 50])
def test_maps_of_two_sizes(max_positions, tmp_path):
    """The student's map, of stride 16, is resized to the teacher's, of stride 8; both are pooled where they are large."""
    model = pair(tmp_path, teacher=segmentors.pspnet(24), max_positions=max_positions)
    data = model.data_preprocessor(random_batch(model, (2, 3, 64, 96)), True)
    with Taps(model, [FEATURE]) as student:
        loss = model(**data, mode='loss')['cirkd.loss_batch']
    (s,), (t,) = (
        student[FEATURE],
        model.sources['teacher'](data['inputs'], None)[FEATURE],
    )
    valid = torch.cat([sample.gt_sem_seg.data for sample in data['data_samples']])[:, 4::8, 4::8] != 255
    s = F.interpolate(s, (8, 12), mode='bilinear')
    (s, _), (t, valid) = (pool_labeled(each, valid, max_positions // 2) for each in (s, t))
    assert t.shape[2:] == ((8, 12) if max_positions > 200 else (4, 6))
    torch.testing.assert_close(loss, batch_loss(s, t, valid))


def test_relations_within_the_batch_are_zero_for_equal_networks(tmp_path):
    model = pair(tmp_path, teacher=segmentors.deeplabv3())
    model.load_state_dict(torch.load(tmp_path / 'teacher.pth', weights_only=True)['state_dict'], strict=False)
    model.eval()
    assert step(model)['loss_batch'].item() == pytest.approx(0, abs=1e-6)


def test_the_checkpoint_has_the_memory(tmp_path):
    model = pair(tmp_path)
    step(model)
    state = {name: value for name, value in model.state_dict().items() if 'queues' in name}
    assert {name: tuple(value.shape) for name, value in state.items()} == {
        'distillers.cirkd.pixel_queues.keys': (19, 30, 24),
        'distillers.cirkd.pixel_queues.count': (19,),
        'distillers.cirkd.region_queues.keys': (19, 8, 24),
        'distillers.cirkd.region_queues.count': (19,),
    }
    assert all(value.any() for value in state.values())


@pytest.mark.parametrize(
    ('layer', 'options', 'message'),
    [
        (
            'decode_head.bottleneck',
            dict(pixel_memory_size=100),
            r'pixel_memory_size=100: 216 of each of the 19 classes',
        ),
        (
            'decode_head.bottleneck',
            dict(region_memory_size=54, region_contrast_size=2000),
            r'region_memory_size=54: 106 of each',
        ),
        ('backbone', {}, r"layer='backbone' puts out 4 maps; name one"),
        (
            ['backbone.layer4', 'decode_head.bottleneck'],
            {},
            r"layer='backbone.layer4, decode_head.bottleneck' put out 2 maps; name one that puts out one",
        ),
    ],
)
def test_pairs_that_cannot_be_compared_are_errors(layer, options, message):
    distiller = CIRKD(layer, **options)
    taps = [probe(models.build(segmentors.pspnet()), [layer] if isinstance(layer, str) else layer) for _ in range(2)]
    with pytest.raises(ConfigError, match=message):
        distiller.setup(*taps)


@pytest.mark.parametrize(
    'options',
    [
        dict(tau=0),
        dict(pixel_contrast_size=0),
        dict(region_contrast_size=1.5),
        dict(pixel_memory_size=True),
        dict(region_memory_size=-1),
        dict(pixels_per_image=0),
        dict(max_positions=0),
        dict(batch_weight='1'),
        dict(pixel_weight='1'),
        dict(region_weight='1'),
    ],
)
def test_options_out_of_range_are_errors(options):
    with pytest.raises(ConfigError, match=next(iter(options)) if 'weight' not in next(iter(options)) else 'weight'):
        CIRKD(**options)
