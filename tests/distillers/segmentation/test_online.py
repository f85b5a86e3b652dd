"""ONE and OKDDip: more decode heads beside the student's own, which learn from each other."""

import math

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from torch import nn

import mmkd
from mmkd.distillers.segmentation.okddip import attention, peer_divergence
from mmkd.distillers.segmentation.one import native_ensemble
from mmkd.errors import ConfigError
from mmkd.testing import detectors, models, segmentors
from mmkd.testing.batches import random_batch

SPECS = {'ONE': dict(type='ONE'), 'OKDDip': dict(type='OKDDip')}
FAMILIES = {'pspnet': segmentors.pspnet, 'segformer': segmentors.segformer}
methods = pytest.mark.parametrize('method', SPECS)


def softmax(values, tau=1.0):
    powers = [math.exp(value / tau) for value in values]
    return [power / sum(powers) for power in powers]


def divergence(target, logits, tau):
    t, s = softmax(target, tau), softmax(logits, tau)
    return sum(p * math.log(p / q) for p, q in zip(t, s, strict=True))


# --- the formulas


def test_the_ensemble_as_plain_loops():
    logits = torch.randn(3, 2, 5, 2, 4, dtype=torch.float64)
    gate = torch.randn(2, 3, 2, 4, dtype=torch.float64)
    found = native_ensemble(list(logits), gate)
    for b in range(2):
        for y in range(2):
            for x in range(4):
                g = softmax(gate[b, :, y, x].tolist())
                for k in range(5):
                    expected = sum(g[i] * logits[i, b, k, y, x].item() for i in range(3))
                    assert found[b, k, y, x].item() == pytest.approx(expected)


def test_an_ensemble_of_equal_branches_is_one_of_them_whatever_the_gate():
    logits = torch.randn(2, 5, 4, 4)
    torch.testing.assert_close(native_ensemble([logits] * 3, torch.randn(2, 3, 2, 2)), logits)


def test_attention_as_plain_loops():
    queries, keys = torch.randn(2, 3, 2, 4, 1, 3, dtype=torch.float64)
    found = attention(queries, keys)
    for b in range(2):
        for x in range(3):
            for i in range(3):
                energies = [(queries[i, b, :, 0, x] * keys[j, b, :, 0, x]).sum().item() for j in range(3)]
                assert found[i, :, b, 0, x].tolist() == pytest.approx(softmax(energies))


def test_what_peers_learn_as_plain_loops():
    logits = 2 * torch.randn(3, 2, 5, 1, 4, dtype=torch.float64)
    weights = torch.randn(3, 3, 2, 1, 4, dtype=torch.float64).softmax(1)
    valid = torch.tensor([[[True, False, True, True]], [[False, True, True, False]]])
    expected = 0.0
    for b in range(2):
        for x in range(4):
            z = [each[b, :, 0, x].tolist() for each in logits]
            for i in range(3):
                target = [sum(weights[i, j, b, 0, x].item() * z[j][k] for j in range(3)) for k in range(5)]
                expected += valid[b, 0, x].item() * divergence(target, z[i], 3.0)
    found = peer_divergence(logits, weights, 3.0, valid)
    assert found.item() == pytest.approx(9 * expected / 5)
    everywhere = peer_divergence(logits, weights, 3.0)
    torch.testing.assert_close(peer_divergence(logits, weights, 3.0, torch.ones_like(valid)), everywhere)


def test_equal_peers_and_those_that_ask_themselves_learn_nothing():
    logits, weights = torch.randn(3, 2, 5, 4, 4), torch.randn(3, 3, 2, 4, 4).softmax(1)
    itself = torch.eye(3)[..., None, None, None].expand(3, 3, 2, 4, 4)
    assert peer_divergence(logits[:1].expand_as(logits), weights, 3.0) == pytest.approx(0, abs=1e-6)
    assert peer_divergence(logits, itself, 3.0) == pytest.approx(0, abs=1e-6)


def test_a_target_has_no_gradient_but_that_of_the_attention():
    """The gradient of a peer's logits is tau (p - p~) alone, the well-known one of a fixed target."""
    logits = torch.randn(3, 1, 5, 1, 1, requires_grad=True)
    weights = torch.randn(3, 3, 1, 1, 1).softmax(1).requires_grad_()
    peer_divergence(logits, weights, 3.0).backward()
    targets = torch.einsum('ijbhw,jbkhw->ibkhw', weights, logits).detach()
    expected = 3.0 * ((logits / 3).softmax(2) - (targets / 3).softmax(2))
    torch.testing.assert_close(logits.grad, expected.detach())
    assert weights.grad.any()


def test_nothing_valid_is_a_differentiable_zero():
    logits = torch.randn(3, 2, 5, 4, 4, requires_grad=True)
    weights = torch.randn(3, 3, 2, 4, 4).softmax(1)
    loss = peer_divergence(logits, weights, 3.0, torch.zeros(2, 4, 4, dtype=torch.bool))
    loss.backward()
    assert loss == 0
    assert not logits.grad.any()


# --- in a student


def online(method, make=segmentors.pspnet, **options):
    model = mmkd.distill(models.build(make(), seed=0), dict(type='Own'), dict(it=dict(SPECS[method], **options)))
    model.init_weights()
    return model.train()


def batch_of(model, images=2, objects=4):
    return model.data_preprocessor(random_batch(model, (images, 3, 64, 96), objects), True)


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout2d):
            module.p = 0.0
    return model


def branches(model):
    (found,) = [each for each in model.distillers.modules() if type(each).__name__ == 'Branches']
    return found


@methods
@pytest.mark.parametrize('family', FAMILIES)
def test_its_losses_are_named_and_reach_every_part(method, family):
    model = online(method, FAMILIES[family])
    found = model(**batch_of(model), mode='loss')
    own = {'ONE': ['ensemble', 1, 2], 'OKDDip': [1, 2, 3]}[method]
    more = {'ONE': ['loss_kl'], 'OKDDip': ['loss_peers', 'loss_leader']}[method]
    expected = [f'it.{key}_{i}' for key in ('loss_ce', 'acc_seg') for i in own] + [f'it.{key}' for key in more]
    assert sorted(key for key in found if key.startswith('it.')) == sorted(expected)
    model.parse_losses(found)[0].backward()
    assert all(each.grad is not None for each in model.parameters())
    assert all(
        each.grad.any() for name, each in model.distillers.named_parameters() if name.endswith('conv_seg.weight')
    )


@methods
def test_the_branches_have_the_learning_rate_of_heads(method):
    """As mmseg's SegFormer configs set it."""
    model = online(method, segmentors.segformer)
    keys = dict(head=dict(lr_mult=10.0))
    optimizer = build_optim_wrapper(
        model, dict(optimizer=dict(type='AdamW', lr=1.0), paramwise_cfg=dict(custom_keys=keys))
    )
    rates = {id(parameter): group['lr'] for group in optimizer.param_groups for parameter in group['params']}
    heads = [model.decode_head, *branches(model)]
    assert all(rates[id(each)] == 10 for head in heads for each in head.parameters())


@methods
def test_without_a_label_all_is_a_differentiable_zero(method):
    model = online(method)
    found = model(**batch_of(model, objects=0), mode='loss')
    total = model.parse_losses(found)[0]
    total.backward()
    assert total == 0
    assert all(each.grad is not None and torch.isfinite(each.grad).all() for each in model.parameters())


@methods
def test_in_a_step_of_weight_0_the_student_and_its_branches_have_their_task_alone(method):
    model, plain = online(method, loss_weight=dict(type='linear', value=1.0, end=2)), models.build(segmentors.pspnet())
    plain.load_state_dict(
        {name: each for name, each in model.state_dict().items() if not name.startswith('distillers')}
    )
    plain.train()
    data = batch_of(model)
    for each in (model, plain):
        without_dropout(each)
    found, expected = (each(**data, mode='loss') for each in (model, plain))
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value)
    teaches = [key for key in found if key in ('it.loss_kl', 'it.loss_peers', 'it.loss_leader')]
    assert all(found[key] == 0 for key in teaches)
    assert found['it.loss_ce_1'] > 0
    found = model(**data, mode='loss')
    assert all(found[key] > 0 for key in teaches)


@methods
@pytest.mark.parametrize('built', [False, True])
def test_every_head_starts_from_weights_of_its_own(method, built):
    """Also beside a student that was built, and so has weights already."""
    model = online(method)
    if built:
        student = models.build(segmentors.pspnet(), seed=5)
        student.init_weights()
        model = mmkd.distill(student, dict(type='Own'), dict(it=dict(SPECS[method])))
        model.init_weights()
    heads = [model.decode_head, *branches(model)]
    for name, value in model.decode_head.named_parameters():
        if value.dim() > 1:
            values = [each.get_parameter(name) for each in heads]
            for index, one in enumerate(values):
                assert not any(torch.equal(one, other) for other in values[:index])
                assert one.std().item() == pytest.approx(value.std().item(), rel=0.5)  # and of the same kind


@methods
def test_the_branches_read_what_the_decode_head_reads(method):
    """With its weights a branch says what it says."""
    model = without_dropout(online(method))
    for each in branches(model):
        each.load_state_dict(model.decode_head.state_dict())
    found = model(**batch_of(model), mode='loss')
    torch.testing.assert_close(found['it.loss_ce_1'], found['decode.loss_ce'])
    if method == 'ONE':
        torch.testing.assert_close(found['it.loss_ce_ensemble'], found['decode.loss_ce'])
    assert sum(found[key] for key in found if key in ('it.loss_kl', 'it.loss_peers', 'it.loss_leader')) < 1e-5


def gradients(model, loss):
    """The names of parts of the model that a loss reaches."""
    names, values = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, values, allow_unused=True, retain_graph=True)
    return {name for name, each in zip(names, found, strict=True) if each is not None and each.any()}


def test_the_ensemble_is_taught_by_labels_alone():
    model = online('ONE')
    found = model(**batch_of(model), mode='loss')
    reached = gradients(model, found['it.loss_kl'])
    assert not any('gate' in name for name in reached)
    assert all(any(name.startswith(f'distillers.it.decode_heads.{i}.') for name in reached) for i in range(2))
    assert 'decode_head.conv_seg.weight' in reached
    assert {'distillers.it.gate.0.weight', 'decode_head.conv_seg.weight'} <= gradients(
        model, found['it.loss_ce_ensemble']
    )


def test_peers_teach_the_leader_and_do_not_learn_from_it():
    model = online('OKDDip')
    found = model(**batch_of(model), mode='loss')
    among, leads = (gradients(model, found[f'it.loss_{key}']) for key in ('peers', 'leader'))
    assert {'distillers.it.query.weight', 'distillers.it.key.weight'} <= among
    assert not any(name.startswith('decode_head') for name in among)
    assert 'decode_head.conv_seg.weight' in leads
    assert not any(name.startswith('distillers') for name in leads)


@methods
def test_the_student_is_plain_without_them(method):
    model = online(method)
    keys = models.build(segmentors.pspnet()).state_dict().keys()
    more = model.state_dict().keys() - keys
    assert any(name.endswith('.1.conv_seg.weight') for name in more)  # they are in the checkpoint
    assert all(name.startswith('distillers.it.') for name in more)
    plain = model.plain()
    assert plain.state_dict().keys() == keys
    assert 'Branches' not in {type(each).__name__ for each in plain.modules()}


@methods
def test_a_step_of_a_plain_loop_under_autocast(method):
    model = online(method)
    data = batch_of(model, images=2)
    with torch.autocast('cpu', torch.bfloat16):
        total = model.parse_losses(model(**data, mode='loss'))[0]
    total.backward()
    assert torch.isfinite(total)
    assert all(each.grad is not None for each in model.distillers.parameters())


@methods
@pytest.mark.parametrize(
    ('make', 'teacher', 'options', 'message'),
    [
        (segmentors.cascade, dict(type='Own'), {}, r'has no single decode_head of mmseg\'s usual kind'),
        (detectors.retinanet, dict(type='Own'), {}, 'RetinaNet has no single decode_head'),
        (segmentors.pspnet, None, {}, r"from no other model; its source is dict\(type='Own'\)"),
        (segmentors.pspnet, dict(type='Own'), dict(branches=1), 'branches=1: expected a whole number'),
        (segmentors.pspnet, dict(type='Own'), dict(branches=2.5), 'branches=2.5: expected a whole number'),
        (segmentors.pspnet, dict(type='Own'), dict(tau=0), 'tau=0: expected a positive temperature'),
    ],
)
def test_what_cannot_work_is_refused(method, make, teacher, options, message):
    student = models.build(make(), seed=0)
    with pytest.raises(ConfigError, match=message):
        mmkd.distill(student, teacher or models.build(make(), seed=1), dict(it=dict(SPECS[method], **options)))


@methods
def test_a_head_of_one_channel_is_refused(method):
    binary = dict(num_classes=2, out_channels=1, loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=True))
    student = models.build(segmentors.pspnet(classes=2, decode_head=binary, auxiliary_head=binary))
    with pytest.raises(ConfigError, match='one channel'):
        mmkd.distill(student, dict(type='Own'), dict(it=SPECS[method]))


@methods
def test_images_that_are_labelled_for_some_classes_are_refused(method):
    model = online(method)
    data = batch_of(model)
    data['data_samples'][0].set_metainfo(dict(labelled_for=[0, 1]))
    with pytest.raises(ConfigError, match='labelled for some classes alone'):
        model(**data, mode='loss')
