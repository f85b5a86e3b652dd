import copy
import math

import pytest
import torch
import torch.nn.functional as F
from mmengine.optim import build_optim_wrapper

from mmkd.distill import distill
from mmkd.distillers.generic.kd import pixel_divergence
from mmkd.distillers.segmentation.skd import SKD, pair_wise_loss, pool_nodes, same_size
from mmkd.errors import ConfigError
from mmkd.hosts.running import probe
from mmkd.taps import Taps
from mmkd.testing import models, segmentors
from mmkd.testing.batches import random_batch
from mmkd.testing.closed_form import closed_form_inputs

LOGITS, FEATURE = 'decode_head.conv_seg', 'decode_head.dropout:input'
OFF = dict(pixel_weight=0, pair_weight=0, holistic_weight=0)


def plain_loops(student, teacher):
    """The formula, pair by pair, in float64."""
    total, pairs = 0.0, 0
    for maps in zip(student, teacher):
        nodes = [feature.flatten(1).T.tolist() for feature in maps]
        for i in range(len(nodes[0])):
            for j in range(len(nodes[0])):
                a_s, a_t = (
                    sum(x * y for x, y in zip(f[i], f[j])) / (math.hypot(*f[i]) * math.hypot(*f[j])) for f in nodes
                )
                total += (a_t - a_s) ** 2
                pairs += 1
    return total / pairs


def test_the_value_that_two_public_implementations_give():
    """With 2x2 windows: SKD's at its scale 0.25, and CIRKD's."""
    student, teacher = closed_form_inputs((2, 6, 8, 8))
    for options in (dict(kernel=2), dict(scale=0.25)):
        nodes = [pool_nodes(each, **options) for each in (student, teacher)]
        assert pair_wise_loss(*nodes).item() == pytest.approx(0.7004991, rel=1e-5)


@pytest.mark.parametrize('max_nodes', [12, 11], ids=['matrices', 'without matrices'])
def test_pairs_as_plain_loops(max_nodes):
    """Of networks with different numbers of channels."""
    student, teacher = torch.randn(2, 5, 3, 4, dtype=torch.float64), torch.randn(2, 7, 3, 4, dtype=torch.float64)
    expected = plain_loops(student, teacher)
    assert pair_wise_loss(student, teacher, max_nodes).item() == pytest.approx(expected, rel=1e-6)


def test_no_more_memory_than_for_max_nodes():
    """And the same loss and gradient as with all similarities in memory."""
    student, teacher = torch.randn(2, 8, 30, 40), torch.randn(2, 16, 30, 40)
    losses, gradients, largest = [], [], []
    for max_nodes in (1200, 1199):
        s = student.clone().requires_grad_()
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x):
            loss = pair_wise_loss(s, teacher, max_nodes)
        loss.backward()
        losses.append(loss), gradients.append(s.grad), largest.append(max(sizes))
    assert largest == [2 * 1200 * 1200, 2 * 16 * 1200]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-9)


def test_pairs_are_unchanged_by_lengths_and_zero_for_equal_features():
    student, teacher = torch.randn(2, 2, 5, 4, 6)
    lengths = 0.1 + torch.rand(2, 1, 4, 6)
    expected = pair_wise_loss(student, teacher)
    assert expected > 0.01
    torch.testing.assert_close(pair_wise_loss(lengths * student, teacher), expected)
    assert pair_wise_loss(lengths * student, student).item() == pytest.approx(0, abs=1e-12)
    assert pair_wise_loss(student, student, max_nodes=1).item() == pytest.approx(0, abs=1e-6)


def test_the_gradient_flows_through_the_norm():
    """Hence along no feature: a length changes nothing."""
    student, teacher = torch.randn(2, 5, 4, 6, requires_grad=True), torch.randn(2, 5, 4, 6, requires_grad=True)
    pair_wise_loss(student, teacher).backward()
    assert student.grad.abs().max() > 1e-3
    torch.testing.assert_close((student * student.grad).sum(1), torch.zeros(2, 4, 6), rtol=0, atol=1e-7)
    assert teacher.grad is None


def test_one_image_channels_last_and_extreme_features():
    student, teacher = torch.randn(2, 1, 5, 4, 6)
    expected = pair_wise_loss(student, teacher)
    three = [each.repeat(3, 1, 1, 1).contiguous(memory_format=torch.channels_last) for each in (student, teacher)]
    torch.testing.assert_close(pair_wise_loss(*three), expected)
    student[0, 0, 0, 0] += 200
    student[0, :, 1, 1] = 0
    student.requires_grad_()
    loss = pair_wise_loss(student, teacher)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize(
    ('size', 'options', 'nodes'),
    [
        ((64, 128), dict(scale=0.5), (2, 2)),
        ((65, 65), dict(scale=0.5), (3, 3)),
        ((64, 128), dict(kernel=2), (32, 64)),
        ((5, 7), dict(kernel=2), (3, 4)),
        ((3, 3), dict(scale=0.1), (3, 3)),
    ],
)
def test_nodes_of_a_map(size, options, nodes):
    """Windows of the same size next to each other; what is left at the edge is a smaller one."""
    feature = torch.randn(1, 2, *size)
    found = pool_nodes(feature, **options)
    assert found.shape[2:] == nodes
    high, wide = (options.get('kernel') or max(1, int(options['scale'] * side)) for side in size)
    for i in range(nodes[0]):
        for j in range(nodes[1]):
            window = feature[:, :, i * high : (i + 1) * high, j * wide : (j + 1) * wide]
            assert torch.equal(found[:, :, i, j], window.amax((2, 3)))


@pytest.mark.parametrize('size', [(4, 6), (2, 6), (4, 3)])
def test_the_students_map_is_resized_where_a_side_differs(size):
    student, teacher = torch.randn(1, 2, *size, requires_grad=True), torch.randn(1, 3, 4, 6)
    found = same_size({'a': (student,)}, 'a', {'b': (teacher,)}, 'b')
    assert found[1] is teacher
    expected = F.interpolate(student, (4, 6), mode='bilinear') if size != (4, 6) else student
    assert torch.equal(found[0], expected)


# --- as a distiller


def pair(tmp_path, teacher=None, student=None, **options):
    """A segmentor that is distilled, its teacher loaded."""
    teacher = teacher or segmentors.pspnet(24, base=16)
    checkpoint = models.save_weights(teacher, tmp_path / 'teacher.pth')
    model = distill(
        models.build(student or segmentors.pspnet(), seed=0),
        dict(config=teacher, checkpoint=checkpoint),
        dict(skd=dict(type='SKD', **options)),
    )
    model.sources['teacher'].load()
    return model.train()


def prepared(model, objects=4, seed=0, shape=(2, 3, 64, 96)):
    return model.data_preprocessor(random_batch(model, shape, objects, seed), True)


def losses(model, data):
    return {key[4:]: value for key, value in model(**data, mode='loss').items() if key.startswith('skd.')}


@pytest.mark.parametrize(
    ('options', 'keys', 'layers'),
    [
        (dict(), ['loss_pixel', 'loss_pair', 'loss_holistic', 'loss_critic'], (LOGITS, FEATURE)),
        ({**OFF, 'pixel_weight': 1.0}, ['loss_pixel'], (LOGITS,)),
        ({**OFF, 'pair_weight': 1.0}, ['loss_pair'], (FEATURE,)),
        ({**OFF, 'holistic_weight': 0.1}, ['loss_holistic', 'loss_critic'], (LOGITS,)),
        (dict(condition_on_image=True, mode='hinge', pixel_weight=0, pair_weight=0), None, (LOGITS, 'backbone:input')),
        ({**OFF, 'pair_weight': dict(type='linear', value=1.0, end=10)}, ['loss_pair'], (FEATURE,)),
    ],
)
@pytest.mark.parametrize('objects', [4, 0])
def test_a_training_step_of_each_term(options, keys, layers, objects, tmp_path):
    """Student and critic learn, the teacher does not; without any labelled pixel as well."""
    model = pair(tmp_path, **options)
    found = losses(model, prepared(model, objects))
    assert list(found) == (keys or ['loss_holistic', 'loss_critic'])
    assert model.distillers.skd.student_layers == layers
    assert all(torch.isfinite(loss) and loss.requires_grad for loss in found.values())
    if 'loss_pixel' in found:
        assert (found['loss_pixel'] > 0) == (objects > 0)
    sum(found.values()).backward()
    gradient = model.backbone.layer1[0].conv1.weight.grad
    assert torch.isfinite(gradient).all()
    assert gradient.any() == (
        not isinstance(options.get('pair_weight'), dict) and (objects > 0 or keys != ['loss_pixel'])
    )
    own = dict(model.distillers.named_parameters())
    assert bool(own) == ('loss_critic' in found)
    for name, parameter in own.items():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    assert all(each.grad is None for each in model.sources['teacher'].model.parameters())


@pytest.mark.parametrize(
    ('mode', 'penalty_weight', 'nodes', 'window'),
    [
        ('wgan-gp', 0.0, dict(kernel=2), (2, 2)),
        ('wgan-gp', 4.0, dict(scale=0.25), (2, 3)),
        ('hinge', 4.0, dict(kernel=3, max_nodes=1), (3, 3)),
    ],
)
def test_each_term_is_its_formula_times_its_weight(mode, penalty_weight, nodes, window, tmp_path):
    """Of a student whose maps are of stride 16 and a teacher's of stride 8, with 8x12 logits: enlarged for the critic."""
    model = pair(
        tmp_path,
        segmentors.pspnet(24),
        segmentors.deeplabv3(decode_head=dict(dropout_ratio=0.0)),
        pixel_weight=3.0,
        pair_weight=5.0,
        holistic_weight=7.0,
        critic_weight=2.0,
        penalty_weight=penalty_weight,
        mode=mode,
        tau=2.0,
        pixel_reduction='image_sum',
        **nodes,
        critic_norm='tanh',
        spectral_norm=False,
    )
    critic = model.distillers.skd.critic
    assert isinstance(critic.norm, torch.nn.Tanh)
    assert not any('parametrizations' in name for name in critic.state_dict())
    data = prepared(model, objects=1)
    own = 'decode_head.conv_seg:input'  # it has no dropout
    with Taps(model, [LOGITS, own]) as student:
        model.decode_head.forward(model.extract_feat(data['inputs']))
    teacher = model.sources['teacher'](data['inputs'], data['data_samples'])
    torch.manual_seed(3)
    found = model.distillers.skd(student, teacher, data['data_samples'])
    (z_s,), (f_s,), (z_t,), (f_t,) = student[LOGITS], student[own], teacher[LOGITS], teacher[FEATURE]
    z_s, f_s = (F.interpolate(each, (8, 12), mode='bilinear') for each in (z_s, f_s))
    assert z_t.shape[2:] == f_t.shape[2:] == (8, 12)
    valid = torch.cat([sample.gt_sem_seg.data for sample in data['data_samples']])[:, 4::8, 4::8] != 255
    assert 0 < valid.sum() < valid.numel()
    torch.testing.assert_close(found['loss_pixel'], 3 * pixel_divergence(z_s, z_t, 2.0, 'image_sum', valid))
    nodes = [F.max_pool2d(each, window, ceil_mode=True) for each in (f_s, f_t)]
    torch.testing.assert_close(found['loss_pair'], 5 * pair_wise_loss(*nodes), rtol=1e-4, atol=1e-6)
    z_s, z_t = (F.interpolate(z, (64, 96), mode='bilinear') for z in (z_s, z_t))
    low, high = critic(z_s), critic(z_t)
    torch.testing.assert_close(found['loss_holistic'], -7 * low.mean())
    expected = low.mean() - high.mean()
    if mode == 'hinge':
        expected = (1 + low).relu().mean() + (1 - high).relu().mean()
    elif penalty_weight:
        expected = expected + penalty_weight * reference_penalty(critic, z_s.detach(), z_t, seed=3)
    torch.testing.assert_close(found['loss_critic'], 2 * expected)


def test_pixel_and_pair_are_zero_for_equal_networks(tmp_path):
    model = pair(tmp_path, segmentors.pspnet())
    plain = torch.load(tmp_path / 'teacher.pth', weights_only=True)['state_dict']
    model.load_state_dict(plain, strict=False)
    model.eval()
    found = losses(model, prepared(model))
    assert found['loss_pixel'].item() == pytest.approx(0, abs=1e-6)
    assert found['loss_pair'].item() == pytest.approx(0, abs=1e-9)
    assert [key for key in model.state_dict() if not key.startswith('distillers.skd.critic.')] == list(plain)


def test_the_critic_sees_the_image_of_the_batch(tmp_path):
    """Normalised, and at the size of the logits."""
    model = pair(tmp_path, **{**OFF, 'holistic_weight': 1.0}, condition_on_image=True, spectral_norm=False)
    critic = model.distillers.skd.critic
    assert critic.layers[0].weight.shape[1] == 19 + 3
    seen = []
    critic.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    data = prepared(model)
    losses(model, data)
    assert len(seen) == 4
    for logits, image in seen:
        assert logits.shape == (2, 19, 64, 96)
        torch.testing.assert_close(image, data['inputs'])  # which happens to have that size


@pytest.mark.parametrize('shape', [(1, 3, 64, 64), (2, 3, 32, 160)])
def test_any_crop_size_and_one_image(shape, tmp_path):
    model = pair(tmp_path)
    model.decode_head.psp_modules.eval()  # pools one image to one position
    found = losses(model, prepared(model, shape=shape))
    assert all(torch.isfinite(loss) for loss in found.values())


def reference_penalty(critic, student, teacher, seed):
    torch.manual_seed(seed)
    share = torch.rand(len(student), 1, 1, 1, dtype=student.dtype)
    between = (share * teacher + (1 - share) * student).requires_grad_()
    (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    return ((slope.square().sum((1, 2, 3)).sqrt() - 1) ** 2).mean()


@pytest.mark.parametrize('mode', ['wgan-gp', 'hinge'])
@pytest.mark.slow
def test_one_optimizer_changes_the_weights_as_two_alternating_ones_do(mode, tmp_path):
    """The authors' order, written out: a step of the student against a frozen critic, then a step of the critic on the
    outputs of the same forward pass.

    A gradient reversed between the two networks would serve for 'wgan-gp', whose student's loss is the critic's with its
    sign turned, but not for 'hinge' or a cross-entropy, whose is another. Constant weights serve for all. In float64, as
    the penalty jumps where rounding lets a LeakyReLU change its side.
    """
    holistic, own, rate, critic_rate = 0.3, 0.2, 0.01, 0.004
    student = segmentors.pspnet(decode_head=dict(dropout_ratio=0.0), auxiliary_head=dict(dropout_ratio=0.0))
    model = pair(
        tmp_path,
        segmentors.pspnet(24),
        student,
        **{**OFF, 'holistic_weight': holistic},
        critic_weight=own,
        mode=mode,
        spectral_norm=False,
    ).double()
    other = copy.deepcopy(model)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    common = dict(momentum=0.9, weight_decay=5e-4)
    keys = {'distillers.skd.critic': dict(lr_mult=critic_rate / rate)}
    single = build_optim_wrapper(
        model, dict(optimizer=dict(type='SGD', lr=rate, **common), paramwise_cfg=dict(custom_keys=keys))
    )
    critic = other.distillers.skd.critic
    plain = [each for name, each in other.named_parameters() if not name.startswith('distillers')]
    first = torch.optim.SGD(plain, lr=rate, **common)
    second = torch.optim.SGD(critic.parameters(), lr=critic_rate, **common)
    for step in range(5):
        data = prepared(model, seed=step, shape=(2, 3, 64, 64))
        data['inputs'] = data['inputs'].double()
        torch.manual_seed(step)
        total, _ = model.parse_losses(model(**data, mode='loss'))
        single.update_params(total)

        t = other.sources['teacher'](data['inputs'], data['data_samples'])[LOGITS][0]
        t = F.interpolate(t, (64, 64), mode='bilinear')
        critic.requires_grad_(False)
        with Taps(other, [LOGITS]) as taps:
            supervised, _ = other.parse_losses(other.loss(data['inputs'], data['data_samples']))
        s = F.interpolate(taps[LOGITS][0], (64, 64), mode='bilinear')
        first.zero_grad()
        (supervised - holistic * critic(s).mean()).backward()
        first.step()

        critic.requires_grad_(True)
        s = s.detach()
        if mode == 'hinge':
            loss = F.relu(1 - critic(t)).mean() + F.relu(1 + critic(s)).mean()
        else:
            loss = critic(s).mean() - critic(t).mean() + 10 * reference_penalty(critic, s, t, step)
        second.zero_grad()
        (own * loss).backward()
        second.step()
    found, expected = model.state_dict(), other.state_dict()
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-9, msg=lambda m, name=name: f'{name}: {m}')
    for name in ('backbone.stem.0.weight', LOGITS + '.weight', 'distillers.skd.critic.layers.0.weight'):
        assert (found[name] - start[name]).abs().max() > 1e-5, name


@pytest.mark.slow
def test_training_with_spectral_norm_stays_finite_and_every_part_of_the_critic_learns(tmp_path):
    model = pair(tmp_path, condition_on_image=True)
    for module in model.distillers.modules():
        if hasattr(module, 'gamma'):
            torch.nn.init.constant_(module.gamma, 0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    for step in range(6):
        total, _ = model.parse_losses(model(**prepared(model, seed=step), mode='loss'))
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        assert torch.isfinite(total)
        for name, parameter in model.distillers.named_parameters():
            assert parameter.grad is not None, name  # DDP waits for each of them
            # a constant added to all scores is no difference between them
            assert parameter.grad.any() or name.endswith('score.bias'), name
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


@pytest.mark.parametrize(
    ('options', 'teacher', 'message'),
    [
        (dict(), dict(classes=7), "'decode_head.conv_seg' puts out 19 channels and .* of the teacher 7"),
        (dict(feature_layer='backbone'), dict(), "layer 'backbone' puts out tensors of shapes"),
        (dict(kernel=32), dict(), 'kernel=32: leaves one node'),
        (dict(critic_norm='layer'), dict(), "critic_norm='layer'"),
    ],
)
def test_layers_that_cannot_be_compared_are_errors(options, teacher, message):
    distiller = SKD(**options)
    networks = [models.build(segmentors.pspnet(**each)) for each in ({}, teacher)]
    distiller.prepare(*networks)
    taps = map(probe, networks, (distiller.student_layers, distiller.teacher_layers))
    with pytest.raises(ConfigError, match=message):
        distiller.setup(*taps)


def test_frozen_features_are_an_error(tmp_path):
    model = pair(tmp_path, **{**OFF, 'pair_weight': 1.0}).requires_grad_(False)
    with pytest.raises(ConfigError, match="'decode_head.dropout:input': its output has no gradient"):
        losses(model, prepared(model))


@pytest.mark.parametrize(
    'options',
    [
        dict(tau=0),
        dict(penalty_weight=-1),
        dict(pixel_reduction='mean'),
        dict(mode='gan'),
        dict(kernel=2, scale=0.5),
        dict(kernel=0),
        dict(kernel=1.5),
        dict(scale=1.0),
        dict(scale=0),
        dict(max_nodes=0),
        dict(critic_weight=0),
        dict(pixel_weight='2'),
        OFF,
    ],
)
def test_options_out_of_range_are_errors(options):
    with pytest.raises(ConfigError, match='weight' if options == dict(pixel_weight='2') else next(iter(options))):
        SKD(**options)
