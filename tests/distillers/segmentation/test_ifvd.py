import math

import pytest
import torch
import torch.nn.functional as F

from mmkd.distill import distill
from mmkd.distillers.segmentation.ifvd import IFVD, intra_class_variation_loss, prototype_similarity
from mmkd.errors import ConfigError
from mmkd.taps import Taps
from mmkd.testing import models, segmentors
from mmkd.testing.batches import random_batch

FEATURE = 'decode_head.dropout:input'


def random_masks(batch=2, classes=4, height=5, width=6):
    """(B, K, H, W), a class or, for one label more, none for each position; the last class is in no image."""
    labels = torch.randint(0, classes, (batch, height, width))
    labels = labels.masked_fill(labels == classes - 1, 255)
    return labels, torch.stack([labels == k for k in range(classes)], 1)


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def plain_loops(student, teacher, labels, count_ignored):
    """The formula, position by position, in float64."""
    total, count = 0.0, 0
    for s_image, t_image, image in zip(student.tolist(), teacher.tolist(), labels.tolist()):
        positions = [(y, x) for y in range(len(image)) for x in range(len(image[0]))]
        for y, x in positions:
            count += count_ignored or image[y][x] != 255
            if image[y][x] == 255:
                continue
            same = [(v, u) for v, u in positions if image[v][u] == image[y][x]]
            similarity = []
            for feature in (s_image, t_image):
                mean = [sum(channel[v][u] for v, u in same) / len(same) for channel in feature]
                similarity.append(cosine([channel[y][x] for channel in feature], mean))
            total += (similarity[0] - similarity[1]) ** 2
    return total / count


@pytest.mark.parametrize('count_ignored', [False, True])
def test_the_formula_as_plain_loops(count_ignored):
    """With other numbers of channels."""
    student, teacher = torch.randn(2, 3, 5, 6, dtype=torch.float64), torch.randn(2, 7, 5, 6, dtype=torch.float64)
    labels, masks = random_masks()
    expected = plain_loops(student, teacher, labels, count_ignored)
    found = intra_class_variation_loss(student, teacher, masks, count_ignored)
    assert found.item() == pytest.approx(expected, rel=1e-6)


def test_counting_ignored_positions_divides_by_the_labelled_part():
    student, teacher = torch.randn(2, 2, 3, 5, 6)
    _, masks = random_masks()
    loss, diluted = (intra_class_variation_loss(student, teacher, masks, each) for each in (False, True))
    torch.testing.assert_close(diluted, loss * masks.sum() / 60)


def test_prototypes_belong_to_one_image_and_one_class():
    feature = torch.randn(2, 3, 5, 6)
    _, masks = random_masks()
    changed = feature.clone()
    changed[0] += 3 * masks[0, 1] * torch.randn(3, 1, 1)
    same = torch.isclose(prototype_similarity(feature, masks), prototype_similarity(changed, masks)).view(2, 5, 6)
    assert same[1].all()
    assert torch.equal(same[0], ~masks[0, 1])


def test_ignored_positions_do_not_matter():
    student, teacher = torch.randn(2, 2, 3, 5, 6)
    _, masks = random_masks()
    ignored = ~masks.any(1, keepdim=True)
    expected = intra_class_variation_loss(student, teacher, masks)
    student, teacher = (each + 50 * ignored * torch.randn_like(each) for each in (student, teacher))
    torch.testing.assert_close(intra_class_variation_loss(student, teacher, masks), expected)


def test_zero_for_equal_inputs_and_for_a_rotated_and_scaled_teacher():
    student = torch.randn(2, 4, 5, 6)
    _, masks = random_masks()
    assert intra_class_variation_loss(student, student, masks).item() == pytest.approx(0, abs=1e-12)
    rotation = torch.linalg.qr(torch.randn(9, 4))[0]  # into more channels
    teacher = 3 * torch.einsum('dc,bchw->bdhw', rotation, student)
    assert intra_class_variation_loss(student, teacher, masks).item() == pytest.approx(0, abs=1e-12)


def test_a_class_of_one_position_and_a_batch_of_one():
    """The only position of a class is its own prototype, for both networks."""
    student, teacher = torch.randn(2, 1, 3, 5, 6)
    _, masks = random_masks(1)
    one = intra_class_variation_loss(student, teacher, masks)
    repeated = intra_class_variation_loss(
        student.repeat(4, 1, 1, 1), teacher.repeat(4, 1, 1, 1), masks.repeat(4, 1, 1, 1)
    )
    torch.testing.assert_close(repeated, one)
    masks = torch.zeros(1, 4, 5, 6, dtype=torch.bool)
    masks[0, 2, 3, 3] = True
    assert intra_class_variation_loss(student, teacher, masks).item() == pytest.approx(0, abs=1e-12)


def test_everything_ignored():
    student, teacher = torch.randn(2, 3, 5, 6, requires_grad=True), torch.randn(2, 3, 5, 6)
    loss = intra_class_variation_loss(student, teacher, torch.zeros(2, 4, 5, 6, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert not student.grad.any()
    assert torch.isfinite(student.grad).all()


def test_channels_last_inputs_and_extreme_features():
    student, teacher = torch.randn(2, 2, 3, 5, 6)
    _, masks = random_masks()
    expected = intra_class_variation_loss(student, teacher, masks)
    last = [each.contiguous(memory_format=torch.channels_last) for each in (student, teacher)]
    torch.testing.assert_close(intra_class_variation_loss(*last, masks), expected)
    student = student.clone()
    student[0, :, 0, 0] += 200
    student[1, :, 0, 0] = 0
    student.requires_grad_()
    loss = intra_class_variation_loss(student, teacher, masks)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()


def test_the_gradient_flows_through_the_prototypes_and_not_to_the_teacher():
    student = torch.randn(1, 3, 5, 6, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(1, 3, 5, 6, dtype=torch.float64, requires_grad=True)
    _, masks = random_masks(1)
    assert torch.autograd.gradcheck(lambda x: intra_class_variation_loss(x, teacher, masks), student)
    intra_class_variation_loss(student, teacher, masks).backward()
    assert teacher.grad is None


def pair(tmp_path, family='pspnet', teacher=None, **options):
    """A segmentor that is distilled, its teacher loaded."""
    config = teacher or getattr(segmentors, family)(24, base=16)
    checkpoint = models.save_weights(config, tmp_path / 'teacher.pth')
    student = models.build(getattr(segmentors, family)(), seed=0)
    model = distill(student, dict(config=config, checkpoint=checkpoint), dict(ifvd=dict(type='IFVD', **options)))
    model.sources['teacher'].load()
    return model.train()


@pytest.mark.parametrize(
    ('family', 'options'),
    [
        ('pspnet', {}),
        ('pspnet', dict(layer=['decode_head.bottleneck', 'backbone.layer4'])),
        ('segformer', dict(layer='decode_head.fusion_conv')),
    ],
)
def test_a_training_step(family, options, tmp_path):
    model = pair(tmp_path, family, **options)
    assert not list(model.distillers.parameters())
    for objects in (4, 0):
        data = model.data_preprocessor(random_batch(model, (2, 3, 64, 96), objects), True)
        model.zero_grad()
        loss = model(**data, mode='loss')['ifvd.loss']
        assert torch.isfinite(loss)
        assert (loss > 0) == (objects > 0)
        loss.backward()
        gradient = next(model.backbone.parameters()).grad
        assert torch.isfinite(gradient).all()
        assert gradient.any() == (objects > 0)
    assert all(each.grad is None for each in model.sources['teacher'].model.parameters())


@pytest.mark.parametrize('count_ignored', [False, True])
def test_maps_of_two_sizes_and_labels_of_a_batch(count_ignored, tmp_path):
    """The student's map, of stride 16, is resized to the teacher's, of stride 8, and so are the labels."""
    model = pair(tmp_path, 'deeplabv3', segmentors.pspnet(24), loss_weight=3.0, count_ignored=count_ignored)
    data = model.data_preprocessor(random_batch(model, (2, 3, 64, 96), objects=2), True)
    with Taps(model, [FEATURE]) as student:
        loss = model(**data, mode='loss')['ifvd.loss']
    (s,), (t,) = (
        student[FEATURE],
        model.sources['teacher'](data['inputs'], None)[FEATURE],
    )
    assert (s.shape[1:], t.shape[1:]) == ((16, 4, 6), (24, 8, 12))
    labels = torch.cat([sample.gt_sem_seg.data for sample in data['data_samples']])[:, 4::8, 4::8]
    masks = torch.stack([labels == k for k in range(19)], 1)
    assert not masks.any(1).all()
    expected = intra_class_variation_loss(F.interpolate(s, (8, 12), mode='bilinear'), t, masks, count_ignored)
    assert expected > 0
    torch.testing.assert_close(loss, 3 * expected)


def test_zero_for_equal_networks(tmp_path):
    model = pair(tmp_path, teacher=segmentors.pspnet())
    model.load_state_dict(torch.load(tmp_path / 'teacher.pth', weights_only=True)['state_dict'])
    model.eval()
    data = model.data_preprocessor(random_batch(model, (2, 3, 64, 96)), True)
    assert model(**data, mode='loss')['ifvd.loss'].item() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize('options', [dict(count_ignored=1), dict(loss_weight='2'), dict(match='size')])
def test_options_out_of_range_are_errors(options):
    with pytest.raises(ConfigError, match=next(iter(options)).removeprefix('loss_')):
        IFVD(**options)
