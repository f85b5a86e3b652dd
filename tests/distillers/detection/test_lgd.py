import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mmkd
from mmkd.distillers.detection import lgd
from mmkd.distillers.schedule import Weight
from mmkd.errors import ConfigError
from mmkd.hosts.detection.second_pass import losses_of_maps
from mmkd.testing import detectors, models, segmentors
from mmkd.testing.batches import random_batch

CLASSES = 3
DENSE = ('retinanet', 'fcos', 'gfl', 'atss')
SHAPE = (48, 64)
SIZES = torch.tensor([[64.0, 48.0], [40.0, 48.0]], dtype=torch.float64)
BOXES = torch.tensor(
    [[[4, 8, 28, 40], [20, 2, 60, 30], [1, 1, 3, 3]], [[8, 8, 36, 44], [0, 0, 0, 0], [0, 0, 0, 0]]],
    dtype=torch.float64,
)
LABELS = torch.tensor([[2, 0, 1], [1, 0, 0]])
VALID = torch.tensor([[True, True, True], [True, False, False]])


def test_tokens_by_hand():
    tokens, boxes, valid = lgd.label_tokens(BOXES, LABELS, VALID, SIZES, CLASSES)
    assert tokens.shape == (2, 4, 7)
    place = [2 * each - 1 for each in (4 / 64, 8 / 48, 28 / 64, 40 / 48)]
    assert tokens[0, 0].tolist() == pytest.approx([*place, -1, -1, 1])
    # the context: the image without its padding, of no class
    assert tokens[:, -1].tolist() == [[-1, -1, 1, 1, -1, -1, -1]] * 2
    assert boxes[:, -1].tolist() == [[0, 0, 64, 48], [0, 0, 40, 48]]
    assert valid.tolist() == [[True] * 4, [True, False, False, True]]


def test_pooling_and_painting_as_plain_loops():
    random = torch.Generator().manual_seed(0)
    feature, tokens = torch.randn(2, 5, 4, 6, generator=random), torch.randn(2, 3, 5, generator=random)
    cells = torch.rand(2, 3, 4, 6, generator=random) < 0.4
    cells[1, 2] = False
    pooled, painted = lgd.pool(feature, cells), lgd.paint(tokens, cells)
    assert pooled[1, 2].tolist() == [0] * 5
    for b in range(2):
        inside = [[(i, j) for i in range(4) for j in range(6) if cells[b, k, i, j]] for k in range(3)]
        for c in range(5):
            for k in range(3):
                mean = sum(feature[b, c, i, j].item() for i, j in inside[k]) / max(1, len(inside[k]))
                assert pooled[b, k, c].item() == pytest.approx(mean, abs=1e-6)
            for i in range(4):
                for j in range(6):
                    added = sum(tokens[b, k, c].item() for k in range(3) if (i, j) in inside[k])
                    assert painted[b, c, i, j].item() == pytest.approx(added, abs=1e-6)


@pytest.mark.parametrize('dims', [(2, 3), (1, 2, 3)])
def test_distance_as_plain_loops(dims):
    student, teacher = [
        [2 + torch.randn(2, 3, *size, dtype=torch.float64) for size in ((4, 5), (2, 3))] for _ in range(2)
    ]

    def normal(values):
        mean = sum(values) / len(values)
        deviation = math.sqrt(sum((each - mean) ** 2 for each in values) / len(values) + 1e-5)
        return [(each - mean) / deviation for each in values]

    total = count = 0
    for s, t in zip(student, teacher):
        groups = [
            (b, slice(None) if len(dims) == 3 else c) for b in range(2) for c in range(1 if len(dims) == 3 else 3)
        ]
        for group in groups:
            pairs = list(zip(*(normal(each[group].flatten().tolist()) for each in (s, t))))
            total += sum((a - b) ** 2 for a, b in pairs)
            count += len(pairs)
    assert lgd.normalized_distance(student, teacher, dims).item() == pytest.approx(total / count, rel=1e-9)


def test_distance_is_zero_for_maps_that_differ_in_scale_and_shift_of_channels():
    level = 10 * torch.randn(2, 3, 6, 7, dtype=torch.float64)
    scale, shift = torch.rand(2, 2, 3, 1, 1, dtype=torch.float64)
    other = (0.5 + scale) * level + shift
    assert lgd.normalized_distance([level], [other], (2, 3)) < 1e-9
    assert lgd.normalized_distance([level], [other], (1, 2, 3)) > 1e-3
    single = torch.randn(2, 3, 1, 1)  # of one position nothing is left
    assert lgd.normalized_distance([single], [single + 1], (2, 3)) == 0


def generator(channels=16):
    torch.manual_seed(0)
    return lgd.LabelGuidedMaps(CLASSES, channels).double()


def pyramid(channels=16):
    random = torch.Generator().manual_seed(1)
    return [torch.randn(2, channels, *size, dtype=torch.float64, generator=random) for size in ((6, 8), (3, 4))]


def test_teacher_maps_image_by_image():
    """The batch, padded to the most boxes, against a loop over images and boxes that writes the formula out."""
    made, student = generator(), pyramid()
    found = made(student, BOXES, LABELS, VALID, SIZES, SHAPE)

    def norm(x):
        return F.layer_norm(x, x.shape)

    def linear(x, layer):
        return layer.weight @ x + layer.bias

    def chain(x, module):
        for each in module:
            x = norm(linear(x, each[0])).clamp(min=0)
        return x

    def transform(x, module):
        hidden = linear(chain(x, module.matrix[0]), module.matrix[1])
        return x @ hidden.view(len(x), len(x))

    weights, biases = made.attention.in_proj_weight.chunk(3), made.attention.in_proj_bias.chunk(3)
    for b in range(2):
        boxes = [(*each.tolist(), label.item()) for each, label, real in zip(BOXES[b], LABELS[b], VALID[b]) if real]
        boxes.append((0, 0, *SIZES[b].tolist(), None))
        labels = []
        for x1, y1, x2, y2, label in boxes:
            place = [x1 / SIZES[b, 0], y1 / SIZES[b, 1], x2 / SIZES[b, 0], y2 / SIZES[b, 1]]
            token = torch.tensor([2 * v - 1 for v in place] + [1.0 if label == c else -1.0 for c in range(CLASSES)])
            first, hidden, second = made.labels.each
            labels.append(transform(chain(transform(token.double(), first), hidden), second))
        image = torch.stack([chain(each, made.labels.image) for each in labels]).amax(0)
        labels = [chain(torch.cat([each, image]), made.labels.both) for each in labels]
        for level, of_student in enumerate(student):
            _, _, height, width = of_student.shape
            look = norm(made.appearance[0](of_student[b : b + 1])[0]).clamp(min=0)
            canvas = torch.zeros(16, height, width, dtype=torch.float64)
            for x1, y1, x2, y2, label in boxes:
                rows = range(math.floor(y1 * height / 48), math.ceil(y2 * height / 48))
                columns = range(math.floor(x1 * width / 64), math.ceil(x2 * width / 64))
                cells = [(i, j) for i in rows for j in columns]
                asks = weights[0] @ (sum(look[:, i, j] for i, j in cells) / len(cells)) + biases[0]
                answer = []
                for head in range(lgd.HEADS):
                    own = slice(2 * head, 2 * head + 2)
                    keys = [(weights[1] @ each + biases[1])[own] for each in labels]
                    values = [(weights[2] @ each + biases[2])[own] for each in labels]
                    shares = torch.stack([asks[own] @ key / math.sqrt(2) for key in keys]).softmax(0)
                    answer.append(sum(share * value for share, value in zip(shares, values)))
                answer = linear(torch.cat(answer), made.attention.out_proj)
                if label is None:
                    context = linear(answer, made.context)
                    continue
                for i, j in cells:
                    canvas[:, i, j] += linear(answer, made.objects)
            painted = (made.painted(canvas[None]) + context[None, :, None, None]).clamp(min=0)
            expected = made.refine(painted)[0]
            torch.testing.assert_close(found[level][b], expected, rtol=1e-9, atol=1e-9)


def test_boxes_that_are_not_there_change_nothing():
    made, student = generator(), pyramid()
    found = made(student, BOXES, LABELS, VALID, SIZES, SHAPE)
    boxes, labels = BOXES.clone(), LABELS.clone()
    boxes[1, 1:], labels[1, 1:] = torch.tensor([5.0, 5.0, 30.0, 30.0]), 2
    for a, b in zip(found, made(student, boxes, labels, VALID, SIZES, SHAPE)):
        torch.testing.assert_close(a, b)
    order = [2, 0, 1]
    for a, b in zip(found, made(student, BOXES[:, order], LABELS[:, order], VALID[:, order], SIZES, SHAPE)):
        torch.testing.assert_close(a, b)


def test_the_teacher_knows_the_classes():
    made, student = generator(), pyramid()
    found = made(student, BOXES, LABELS, VALID, SIZES, SHAPE)[0]
    other = made(student, BOXES, (LABELS + 1) % CLASSES, VALID, SIZES, SHAPE)[0]
    assert (found - other).abs().mean() > 1e-3


def distilled(family='retinanet', student=None, **options):
    student = student or models.build(getattr(detectors, family)(), seed=0)
    return mmkd.distill(student, dict(type='Own'), dict(it=dict(type='LGD', **options))).train()


def batch_of(model, objects=4, shapes=()):
    data = random_batch(model, (2, 3, 96, 128), objects)
    for index, (height, width) in enumerate(shapes):
        data['inputs'][index] = data['inputs'][index][:, :height, :width]
        data['data_samples'][index].set_metainfo(dict(img_shape=(height, width)))
        boxes = data['data_samples'][index].gt_instances.bboxes
        boxes[:, 0::2] *= width / 128
        boxes[:, 1::2] *= height / 96
    return model.data_preprocessor(data, True)


def gradients(model, value):
    model.zero_grad()
    value.backward(retain_graph=True)
    return {name for name, each in model.named_parameters() if each.grad is not None and each.grad.abs().sum() > 0}


@pytest.mark.parametrize('family', [*DENSE, 'faster_rcnn'])
def test_who_learns_what(family):
    model = distilled(family)
    found = model(**batch_of(model), mode='loss')
    of_distance = gradients(model, found['it.loss'])
    assert any(name.startswith('backbone') for name in of_distance)
    assert not any('head' in name or '.teacher.' in name for name in of_distance)
    assert {name for name, _ in model.named_parameters() if '.adapter.' in name} <= of_distance
    of_teacher = gradients(model, found['it.loss_teacher'])
    assert any(name.startswith('bbox_head' if family in DENSE else 'roi_head') for name in of_teacher)
    assert any(name.startswith('backbone') for name in of_teacher)  # by the appearance
    assert not any('.adapter.' in name for name in of_teacher)
    assert {name for name, _ in model.named_parameters() if '.teacher.' in name} <= of_teacher


def test_without_weight_the_adapter_alone_learns():
    model = distilled(loss_weight=dict(type='constant', value=2.0, begin=1))
    batch = batch_of(model)
    first = model(**batch, mode='loss')
    learns = gradients(model, first['it.loss'])
    assert learns == {name for name, _ in model.named_parameters() if '.adapter.' in name}
    assert gradients(model, first['it.loss_teacher'])
    second = model(**batch, mode='loss')
    torch.testing.assert_close(second['it.loss'], 2 * first['it.loss'])
    assert any(name.startswith('backbone') for name in gradients(model, second['it.loss']))


@pytest.mark.parametrize('family', DENSE)
def test_heads_over_the_necks_own_maps_have_the_students_losses(family):
    model = models.build(getattr(detectors, family)(), seed=0).train()
    batch = batch_of(model)
    samples = copy.deepcopy(batch['data_samples'])
    expected, _ = model.parse_losses(model.loss(batch['inputs'], batch['data_samples']))
    found = losses_of_maps(model, model.extract_feat(batch['inputs']), batch['data_samples'])
    torch.testing.assert_close(found, expected)
    assert 'extract_feat' not in vars(model)
    for before, after in zip(samples, batch['data_samples']):
        assert torch.equal(before.gt_instances.bboxes, after.gt_instances.bboxes)


def test_batch_norms_of_the_head_see_the_neck_alone():
    config = detectors.gfl(bbox_head=dict(norm_cfg=dict(type='BN')))
    model = distilled(student=models.build(config, seed=0))
    alone = models.build(config, seed=0).train()
    batch = batch_of(model)
    model(**batch, mode='loss')
    alone.loss(batch['inputs'], batch['data_samples'])
    norms = [name for name, each in alone.named_modules() if isinstance(each, nn.BatchNorm2d) and 'head' in name]
    assert norms
    for name in norms:
        own, other = model.get_submodule(name), alone.get_submodule(name)
        assert own.track_running_stats
        assert own.num_batches_tracked == other.num_batches_tracked > 0
        torch.testing.assert_close(own.running_mean, other.running_mean)
        torch.testing.assert_close(own.running_var, other.running_var)


@pytest.mark.parametrize('family', [*DENSE, 'faster_rcnn'])
def test_without_a_box_nothing_is_learnt(family):
    model = distilled(family)
    found = model(**batch_of(model, objects=0), mode='loss')
    losses = [value for key, value in found.items() if key.startswith('it.')]
    assert losses == [0, 0]
    sum(losses).backward()
    for name, each in model.distillers.named_parameters():
        assert each.grad is not None, name
        assert torch.isfinite(each.grad).all()


def test_the_context_is_the_image_without_its_padding(monkeypatch):
    model = distilled()
    batch = batch_of(model, shapes=[(96, 128), (64, 80)])
    assert [tuple(each.metainfo['batch_input_shape']) for each in batch['data_samples']] == [(96, 128)] * 2
    seen = []
    original = lgd.covered_cells
    monkeypatch.setattr(lgd, 'covered_cells', lambda *given: seen.append(original(*given)) or seen[-1])
    found = model(**batch, mode='loss')
    assert all(torch.isfinite(value).all() for key, value in found.items() if key.startswith('it.'))
    context = seen[0][:, -1]  # at a stride of 8
    assert context[0].all()
    assert context[1, :8, :10].all()
    assert context[1].sum() == 80


def test_half_precision_is_computed_in_float32():
    model = distilled()
    batch = batch_of(model)
    expected = model(**batch, mode='loss')
    with torch.autocast('cpu', torch.bfloat16):
        found = model(**batch, mode='loss')
    for key in ('it.loss', 'it.loss_teacher'):
        assert found[key].dtype == torch.float32
        torch.testing.assert_close(found[key], expected[key], rtol=2e-2, atol=2e-2)


def test_the_plain_model_is_left(tmp_path):
    model = distilled()
    plain = models.build(detectors.retinanet(), seed=0)
    assert any(key.startswith('distillers.it.teacher') for key in model.state_dict())
    model.plain()
    assert type(model) is type(plain)
    assert list(model.state_dict()) == list(plain.state_dict())


def test_another_network_as_teacher_is_refused():
    config = detectors.retinanet()
    with pytest.raises(ConfigError, match=r"distillers.it: LGD learns from labels .* use teacher=dict\(type='Own'\)"):
        mmkd.distill(models.build(config), models.build(config, seed=1), dict(it=dict(type='LGD')))


def test_students_without_boxes_are_refused():
    with pytest.raises(ConfigError, match=r'LGD runs the heads over maps made of labels; a detector with a neck'):
        mmkd.distill(models.build(segmentors.pspnet()), dict(type='Own'), dict(it=dict(type='LGD')))


def test_channels_that_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match='the neck puts out 12 channels; LGD needs'):
        mmkd.distill(models.build(detectors.retinanet(12)), dict(type='Own'), dict(it=dict(type='LGD')))


def test_images_with_some_labels_are_refused():
    model = distilled()
    batch = batch_of(model)
    batch['data_samples'][0].set_metainfo(dict(labelled_for=(0, 1)))
    with pytest.raises(ConfigError, match='labelled for some classes alone'):
        model(**batch, mode='loss')
    batch = batch_of(model)
    batch['data_samples'][0].set_metainfo(dict(domain='target'))
    with pytest.raises(ConfigError, match='images without labels'):
        model(**batch, mode='loss')


def test_the_weight_is_a_schedule():
    assert isinstance(lgd.LGD().loss_weight, Weight)
    with pytest.raises(ConfigError, match=r'loss_weight=-1'):
        lgd.LGD(loss_weight=-1)
