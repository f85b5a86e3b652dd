import copy
import math

import pytest
import torch
import torch.nn.functional as F
from mmengine.structures import PixelData
from torch import nn

from mmkd.distill import distill
from mmkd.distillers.segmentation import dakd
from mmkd.distillers.segmentation.dakd import DAKD, Domains
from mmkd.errors import ConfigError
from mmkd.taps import Taps
from mmkd.testing import models, segmentors
from mmkd.testing.batches import random_batch
from mmkd.testing.closed_form import closed_form_inputs

LAYERS = ('decode_head.conv_seg', 'auxiliary_head.conv_seg')
KEYS = (
    'loss_kl', 'loss_auxiliary_kl', 'loss_mse', 'loss_pseudo', 'loss_adversarial', 'loss_auxiliary_adversarial', 'loss_critic'
)  # fmt: skip


class Heads(nn.Module):
    """The two heads of a segmentor; their classifiers put out what they are given."""

    def __init__(self, classes):
        super().__init__()
        for name in ('decode_head', 'auxiliary_head'):
            head = nn.Module()
            head.conv_seg = nn.Identity()
            head.ignore_index, head.align_corners, head.num_classes = 255, False, classes
            self.add_module(name, head)


def taps(main, auxiliary):
    model = Heads(main.shape[1])
    with Taps(model, LAYERS) as read:
        model.decode_head.conv_seg(main)
        model.auxiliary_head.conv_seg(auxiliary)
    return read


def samples(labels, domains, shapes=None):
    """Data samples of label maps, (B, H, W), with their domains and, if given, sizes before padding."""
    from mmseg.structures import SegDataSample

    found = []
    for index, label in enumerate(labels):
        meta = dict(domain='target') if domains[index] == 't' else {}
        meta |= dict(img_shape=shapes[index]) if shapes else {}
        sample = SegDataSample(metainfo=meta)
        sample.gt_sem_seg = PixelData(data=label[None])
        found.append(sample)
    return found


def made(student, teacher, dtype=torch.float64, **options):
    distiller = DAKD(critic_channels=2, **options)
    distiller.prepare(student.model, teacher.model)
    distiller.setup(student, teacher)
    return distiller.to(dtype)


def softmax(values):
    powers = [math.exp(value - max(values)) for value in values]
    return [power / sum(powers) for power in powers]


def mean(values):
    return sum(values) / max(len(values), 1)


def pixels(logits, valid):
    """The class probabilities of each valid position."""
    batch, _, height, width = logits.shape
    return [
        softmax(logits[b, :, y, x].tolist())
        for b in range(batch)
        for y in range(height)
        for x in range(width)
        if valid[b, y, x]
    ]


def kl(student, teacher):
    return mean([sum(t * math.log(t / s) for s, t in zip(*pair)) for pair in zip(student, teacher)])


def squares(student, teacher):
    return mean([mean([(math.log(s) - math.log(t)) ** 2 for s, t in zip(*pair)]) for pair in zip(student, teacher)])


def pseudo(student, teacher, threshold=None):
    return mean([-math.log(s[t.index(max(t))]) for s, t in zip(student, teacher) if max(t) >= (threshold or 0)])


def bce(decisions, domain, valid):
    found = []
    for b, y, x in valid.nonzero().tolist():
        probability = 1 / (1 + math.exp(-decisions[b, 0, y, x].item()))
        found.append(-math.log(probability if domain == 'target' else 1 - probability))
    return mean(found)


def convolution(feature, weight, bias):
    """4x4, stride 2, padding 1."""
    channels, height, width = feature.shape
    out = torch.zeros(len(weight), height // 2, width // 2, dtype=feature.dtype)
    for o in range(len(weight)):
        for y in range(height // 2):
            for x in range(width // 2):
                total = bias[o].item()
                for i in range(4):
                    for j in range(4):
                        row, column = 2 * y + i - 1, 2 * x + j - 1
                        if 0 <= row < height and 0 <= column < width:
                            total += sum(feature[c, row, column] * weight[o, c, i, j] for c in range(channels))
                out[o, y, x] = total
    return out


def test_the_critic_as_plain_loops():
    critic = dakd.domain_critic(2, channels=1).double()
    feature = torch.randn(1, 2, 32, 64, dtype=torch.float64)
    weights = list(critic.parameters())
    for bias in weights[1::2]:
        assert not bias.any()
        nn.init.normal_(bias)
    assert [tuple(weight.shape[:2]) for weight in weights[::2]] == [(1, 2), (2, 1), (4, 2), (8, 4), (1, 8)]
    with torch.no_grad():
        expected = feature[0]
        for layer in range(5):
            expected = convolution(expected, weights[2 * layer], weights[2 * layer + 1])
            if layer < 4:
                expected = torch.where(expected > 0, expected, 0.2 * expected)
        torch.testing.assert_close(critic(feature)[0], expected)
    assert expected.shape == (1, 1, 2)
    assert dakd.domain_critic(19)[6].weight.shape == (512, 256, 4, 4)


@pytest.mark.parametrize('threshold', [None, 0.5, 1.0])
def test_distance_and_pseudo_labels_as_plain_loops(threshold):
    student, teacher = torch.randn(2, 2, 4, 3, 5, dtype=torch.float64)
    valid = torch.rand(2, 3, 5) > 0.3
    pair = pixels(student, valid), pixels(teacher, valid)
    assert dakd.log_probability_distance(student, teacher, valid).item() == pytest.approx(squares(*pair), rel=1e-6)
    expected = pseudo(*pair, threshold)
    assert dakd.pseudo_label_loss(student, teacher, valid, threshold).item() == pytest.approx(expected, rel=1e-6)
    assert (expected == 0) == (threshold == 1)


def losses_as_plain_loops(student, teacher, labels, shapes, distiller, upsample, label_size):
    """Everything, in the order of the formulas; the first two images are the source's, the third is the target's."""
    student = {layer: student[layer][0].detach() for layer in LAYERS}
    teacher = {layer: teacher[layer][0] for layer in LAYERS}
    height, width = labels.shape[1:]
    original = student

    def resized(logits, size):
        return F.interpolate(logits, size, mode='bilinear', align_corners=False)

    if label_size:
        student, teacher = (
            {layer: resized(z, (height, width)) for layer, z in each.items()} for each in (student, teacher)
        )
    else:
        student = {layer: resized(z, teacher[layer].shape[2:]) for layer, z in student.items()}
    expected = dict.fromkeys(KEYS, 0.0)

    def counts(h, w, with_labels):
        valid = torch.zeros(3, h, w, dtype=torch.bool)
        for b in range(3):
            for y in range(h):
                for x in range(w):
                    row, column = (2 * y + 1) * height // (2 * h), (2 * x + 1) * width // (2 * w)
                    inside = row < shapes[b][0] and column < shapes[b][1]
                    ignored = with_labels and b < 2 and labels[b, row, column].item() == 255
                    valid[b, y, x] = inside and not ignored
        return valid

    weights = OWN_WEIGHTS
    divisor = 3 if distiller.reduction == 'element_mean' else 1
    for images, gamma in ((slice(0, 2), 1.0), (slice(2, 3), 0.7)):
        pairs = {}
        for layer in LAYERS:
            valid = counts(*student[layer].shape[2:], True)[images]
            pairs[layer] = pixels(student[layer][images], valid), pixels(teacher[layer][images], valid)
        main, auxiliary = pairs.values()
        expected['loss_kl'] += gamma * weights['kl_weight'] * kl(*main) / divisor
        expected['loss_auxiliary_kl'] += gamma * weights['auxiliary_kl_weight'] * kl(*auxiliary) / divisor
        expected['loss_mse'] += gamma * weights['mse_weight'] * squares(*auxiliary)
        expected['loss_pseudo'] += gamma * weights['pseudo_weight'] * pseudo(*main, 0.4)
    for key, layer, critic in zip(KEYS[4:6], LAYERS, distiller.critics.values()):
        weight = weights[key.removeprefix('loss_') + '_weight']
        size = (height, width) if upsample else (32, 32)
        decisions = critic(resized(original[layer], size).softmax(1))
        valid = counts(size[0] // 32, size[1] // 32, False)
        source, target = (decisions[:2], valid[:2]), (decisions[2:], valid[2:])
        expected[key] += weight * bce(target[0], 'source', target[1])
        expected['loss_critic'] += 0.5 * bce(source[0], 'source', source[1]) + 0.5 * bce(target[0], 'target', target[1])
    return expected


OWN_WEIGHTS = {
    f'{key.removeprefix("loss_")}_weight': weight for key, weight in zip(KEYS, (2.0, 3.0, 5.0, 7.0, 11.0, 13.0))
}


@pytest.mark.parametrize(
    ('upsample', 'label_size', 'reduction'),
    [(True, False, 'element_mean'), (False, False, 'pixel_mean'), (True, True, 'element_mean')],
)
def test_all_losses_as_plain_loops(upsample, label_size, reduction):
    """Three classes, logits of two sizes, ignored source pixels, and padded images of both domains."""
    size = (64, 96) if not label_size else (32, 64)
    student = taps(*torch.randn(2, 3, 3, 4, 6, dtype=torch.float64))
    teacher = taps(*torch.randn(2, 3, 3, 8, 12, dtype=torch.float64))
    labels = torch.randint(0, 3, (3, *size))
    labels[:2][torch.rand(2, *size) < 0.3] = 255
    labels[2] = 255
    shapes = [size, (size[0], size[1] // 2), (size[0] // 2, size[1] - 32)]
    options = dict(target_weight=0.7, threshold=0.4, upsample=upsample, label_size=label_size, reduction=reduction)
    distiller = made(student, teacher, **options, **OWN_WEIGHTS)
    expected = losses_as_plain_loops(student, teacher, labels, shapes, distiller, upsample, label_size)
    with torch.no_grad():
        found = distiller(student, teacher, samples(labels, 'sst', shapes))
    assert set(found) == set(expected)
    for key, value in found.items():
        assert value.item() == pytest.approx(expected[key], rel=1e-6), key


def test_the_divergence_that_the_public_code_means():
    """0.2311546 for each domain of one image."""
    student, teacher = closed_form_inputs((2, 5, 4, 6))
    student, teacher = taps(student, student), taps(teacher, teacher)
    distiller = made(student, teacher, torch.float32)
    whole = torch.zeros(2, 32, 48, dtype=torch.long)
    with torch.no_grad():
        losses = distiller(student, teacher, samples(whole, 'st'))
    assert losses['loss_kl'].item() == pytest.approx(0.1 * 2 * 0.2311546, rel=1e-5)
    assert losses['loss_auxiliary_kl'].item() == pytest.approx(0.01 * 2 * 0.2311546, rel=1e-5)


def case(batch=4):
    """Taps with gradients, and data samples: the source's images first, then the target's."""
    features = torch.randn(4, batch, 5, 4, 6)
    student = taps(*(feature.clone().requires_grad_() for feature in features[:2]))
    teacher = taps(*(feature.clone().requires_grad_() for feature in features[2:]))
    labels = torch.randint(0, 5, (batch, 32, 48))
    labels[batch // 2 :] = 255
    return student, teacher, samples(labels, 's' * (batch // 2) + 't' * (batch - batch // 2))


def gradients(student):
    return [student[layer][0].grad for layer in LAYERS]


def test_zero_for_equal_networks_where_the_formula_is():
    student, _, data_samples = case()
    found = made(student, student, torch.float32)(student, student, data_samples)
    assert found['loss_kl'].item() == pytest.approx(0, abs=1e-7)
    assert found['loss_auxiliary_kl'].item() == pytest.approx(0, abs=1e-7)
    assert found['loss_mse'].item() == 0
    assert found['loss_pseudo'].item() > 0


def test_as_large_for_more_images_in_any_order():
    student, teacher, data_samples = case()
    distiller = made(student, teacher, torch.float32)
    expected = distiller(student, teacher, data_samples)
    order = [2, 0, 3, 1, 1, 3, 0, 2]
    several = (taps(*(each[layer][0][order] for layer in LAYERS)) for each in (student, teacher))
    found = distiller(*several, [data_samples[index] for index in order])
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value)


@pytest.mark.parametrize('key', KEYS)
def test_who_learns_from_which_loss(key):
    student, teacher, data_samples = case()
    distiller = made(student, teacher, torch.float32)
    distiller(student, teacher, data_samples)[key].backward()
    reached = [grad is not None and bool(grad.any()) for grad in gradients(student)]
    main, auxiliary = [True, False], [False, True]
    by_key = dict(
        loss_auxiliary_kl=auxiliary, loss_mse=auxiliary, loss_auxiliary_adversarial=auxiliary, loss_critic=[False] * 2
    )
    assert reached == by_key.get(key, main)
    assert gradients(teacher) == [None, None]
    for parameter in distiller.critics.parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == (key == 'loss_critic')
    if 'adversarial' in key:  # the source's outputs need not look like the source's
        assert not any(grad[:2].any() for grad in gradients(student) if grad is not None)


def test_the_targets_weight_is_of_the_teachers_part_alone():
    student, teacher, data_samples = case()
    losses = made(student, teacher, torch.float32, target_weight=0.0)(student, teacher, data_samples)
    sum(losses[key] for key in KEYS[:4]).backward(retain_graph=True)
    assert all(grad[:2].any() and not grad[2:].any() for grad in gradients(student))
    (losses['loss_adversarial'] + losses['loss_auxiliary_adversarial']).backward()
    assert all(grad[2:].any() for grad in gradients(student))


def test_weights_follow_their_schedules_and_scale_their_own_losses():
    student, teacher, data_samples = case()
    distiller = made(student, teacher, torch.float32)
    twice = dict(kl_weight=0.2, auxiliary_kl_weight=0.02, mse_weight=0.02, pseudo_weight=2.0)
    twice |= dict(adversarial_weight=2e-3, auxiliary_adversarial_weight=dict(type='constant', value=4e-4))
    other = made(student, teacher, torch.float32, **twice)
    other.load_state_dict(distiller.state_dict())
    expected, found = (each(student, teacher, data_samples) for each in (distiller, other))
    torch.testing.assert_close(found.pop('loss_critic'), expected.pop('loss_critic'))
    for key, value in found.items():
        torch.testing.assert_close(value, 2 * expected[key])


def test_a_source_without_labels():
    """Teaches nothing, but its outputs still teach the critics."""
    student, teacher, data_samples = case()
    for sample in data_samples[:2]:
        sample.gt_sem_seg.data.fill_(255)
    losses = made(student, teacher, torch.float32)(student, teacher, data_samples)
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) and loss > 0 for loss in losses.values())
    assert not any(grad[:2].any() for grad in gradients(student))


def test_the_two_losses_in_one_backward_pass_give_what_two_steps_give():
    """As the authors take them: the student's with the critic frozen, the critic's with the outputs detached."""
    torch.manual_seed(0)
    images = torch.randn(3, 2, 3, 32, 32)
    both = torch.ones(2, 1, 1, dtype=torch.bool)

    def outputs(student, image):
        return student(image).softmax(1)

    def cross_entropy(decisions, domain):
        return F.binary_cross_entropy_with_logits(decisions, torch.full_like(decisions, domain))

    def two_steps(student, critic, image, optimizers):
        source, target = (outputs(student, each) for each in (image, image.flip(0) ** 2))
        critic.requires_grad_(False)
        optimizers[0].zero_grad()
        cross_entropy(critic(target), 0).backward()
        critic.requires_grad_(True)
        optimizers[1].zero_grad()
        (cross_entropy(critic(source.detach()), 0) / 2).backward()
        (cross_entropy(critic(target.detach()), 1) / 2).backward()
        for optimizer in optimizers:
            optimizer.step()

    def one_backward(student, critic, image, optimizer):
        source, target = (outputs(student, each) for each in (image, image.flip(0) ** 2))
        optimizer.zero_grad()
        sum(dakd.adversarial_losses(critic, source, target, (both, both))).backward()
        optimizer.step()

    student, critic = nn.Conv2d(3, 5, 3, padding=1), dakd.domain_critic(5, channels=4)
    own, own_critic = copy.deepcopy(student), copy.deepcopy(critic)
    optimizers = [torch.optim.SGD(each.parameters(), 0.5, momentum=0.9) for each in (student, critic)]
    optimizer = torch.optim.SGD([*own.parameters(), *own_critic.parameters()], 0.5, momentum=0.9)
    start = copy.deepcopy(own.state_dict())
    for image in images:
        two_steps(student, critic, image, optimizers)
        one_backward(own, own_critic, image, optimizer)
        for a, b in ((student, own), (critic, own_critic)):
            for (name, parameter), other in zip(a.named_parameters(), b.parameters()):
                torch.testing.assert_close(other.grad, parameter.grad, msg=name)
                assert parameter.grad.any()
    for a, b in ((student, own), (critic, own_critic)):
        torch.testing.assert_close(dict(b.state_dict()), dict(a.state_dict()))
    assert not torch.equal(own.weight, start['weight'])


@pytest.mark.parametrize('options', [dict(), dict(upsample=False), dict(label_size=True)])
def test_channels_last_inputs_extreme_logits_and_one_image_of_each(options):
    student, teacher, data_samples = case(batch=2)
    distiller = made(student, teacher, torch.float32, **options)
    expected = distiller(student, teacher, data_samples)
    last = [
        taps(*(each[layer][0].contiguous(memory_format=torch.channels_last) for layer in LAYERS))
        for each in (student, teacher)
    ]
    for key, value in distiller(*last, data_samples).items():
        torch.testing.assert_close(value, expected[key])
    for each, channel in ((student, 0), (teacher, 1)):
        for layer in LAYERS:
            each[layer][0].data[:, channel, 0, 0] += 200
    losses = distiller(student, teacher, data_samples)
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert all(torch.isfinite(grad).all() for grad in gradients(student))


def test_positions_on_images():
    domains = Domains.of(samples(torch.zeros(2, 8, 12, dtype=torch.long), 'st', [(8, 12), (3, 7)]))
    expected = torch.zeros(4, 4, dtype=torch.bool)
    expected[:1, :2] = True  # pixels 1, 3, 5 and 7 below 3; pixels 1, 4, 7 and 10 below 7
    assert domains.on_images((4, 4)).tolist() == [torch.ones(4, 4, dtype=torch.bool).tolist(), expected.tolist()]
    whole = Domains.of(samples(torch.zeros(2, 8, 12, dtype=torch.long), 'ts'))
    assert whole.on_images((4, 6)).all()
    assert (whole.source.tolist(), whole.target.tolist()) == ([1], [0])


@pytest.mark.parametrize('domains', ['ss', 'tt', 's', 't'])
def test_a_batch_of_one_domain_is_an_error(domains):
    student, teacher, _ = case(batch=2)
    distiller = made(student, teacher, torch.float32)
    found = samples(torch.zeros(len(domains), 32, 48, dtype=torch.long), domains)
    with pytest.raises(ConfigError, match='DomainSampler'):
        distiller(student, teacher, found)


@pytest.mark.parametrize(
    'options',
    [
        dict(reduction='mean'),
        dict(threshold=1.5),
        dict(threshold='high'),
        dict(critic_channels=0),
        dict(kl_weight='much'),
        dict(target_weight=dict(type='linear', value=1)),
    ],
)
def test_options_out_of_range_are_errors(options):
    name = next(iter(options))
    with pytest.raises(ConfigError, match='weight' if 'weight' in name else name):
        DAKD(**options)


def pair(tmp_path, teacher=None, student=None, **options):
    teacher = teacher or segmentors.deeplabv3(24, base=12)
    checkpoint = models.save_weights(teacher, tmp_path / 'teacher.pth')
    model = distill(
        models.build(student or segmentors.deeplabv3(), seed=0),
        dict(config=teacher, checkpoint=checkpoint),
        dict(dakd=dict(type='DAKD', critic_channels=4, **options)),
    )
    model.sources['teacher'].load()
    return model.train()


def two_domains(model, images=4, shape=(64, 96)):
    """A batch whose second half is of the target."""
    batch = random_batch(model, (images, 3, *shape))
    for sample in batch['data_samples'][images // 2 :]:
        sample.set_metainfo(dict(domain='target'))
        sample.gt_sem_seg.data.fill_(255)
    return model.data_preprocessor(batch, True)


@pytest.mark.parametrize(
    ('teacher', 'options'),
    [
        (None, {}),
        (None, dict(upsample=False, label_size=True)),
        (segmentors.pspnet(24, base=12), {}),  # logits of half the stride
    ],
)
def test_student_and_critics_learn_and_the_teacher_does_not(teacher, options, tmp_path):
    model = pair(tmp_path, teacher, **options)
    losses = model(**two_domains(model), mode='loss')
    found = {key: value for key, value in losses.items() if key.startswith('dakd.')}
    assert set(found) == {f'dakd.{key}' for key in KEYS}
    assert all(torch.isfinite(loss) and loss > 0 for loss in found.values())
    sum(found.values()).backward()
    for name in ('backbone.layer3.0.conv1', *LAYERS):
        assert model.get_submodule(name).weight.grad.any(), name
    own = dict(model.distillers.named_parameters())
    assert set(own) == {
        f'dakd.critics.{head}.{layer}.{kind}'
        for head in ('main', 'auxiliary')
        for layer in (0, 2, 4, 6, 8)
        for kind in ('weight', 'bias')
    }
    for name, parameter in own.items():
        assert parameter.grad.any(), name
    assert all(each.grad is None for each in model.sources['teacher'].model.parameters())


def test_a_source_loss_that_is_a_mean_over_labelled_pixels_does_not_see_the_target(tmp_path):
    """What the config asks for: a batch half of which is ignored has the loss of its labelled half."""
    losses = {}
    for mean_of_all in (True, False):
        head = dict(loss_decode=dict(avg_non_ignore=not mean_of_all), dropout_ratio=0)
        model = pair(tmp_path, student=segmentors.deeplabv3(decode_head=head)).eval()
        data = two_domains(model)
        for sample in data['data_samples'][:2]:
            sample.gt_sem_seg.data.fill_(3)
        both = model(**data, mode='loss')['decode.loss_ce']
        features = model.extract_feat(data['inputs'][:2])
        source = model.decode_head.loss(features, data['data_samples'][:2], {})['loss_ce']
        losses[mean_of_all] = (both / source).item()
    assert losses == {True: pytest.approx(0.5), False: pytest.approx(1)}


def test_a_network_without_an_auxiliary_head_or_other_classes_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match='auxiliary_head.conv_seg'):
        pair(tmp_path, segmentors.segformer())
    with pytest.raises(ConfigError, match='same classes'):
        pair(tmp_path, segmentors.deeplabv3(classes=7))
