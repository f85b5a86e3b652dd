import copy
import math

import pytest
import torch
from torch import nn

import mmkd
from mmkd.distillers.generic.maskd import MasKD, ReceptiveTokens, masked_loss
from mmkd.distillers.tokens import overlap, token_masks
from mmkd.errors import ConfigError
from mmkd.testing import detectors, models, segmentors
from mmkd.testing.batches import random_batch
from mmkd.testing.closed_form import closed_form_inputs


def masks_plain_loops(tokens, feature):
    b, c, h, w = feature.shape
    found = torch.zeros(b, len(tokens), h, w, dtype=torch.float64)
    for n in range(b):
        for t in range(len(tokens)):
            for y in range(h):
                for x in range(w):
                    total = sum(tokens[t, k].item() * feature[n, k, y, x].item() for k in range(c))
                    found[n, t, y, x] = 1 / (1 + math.exp(-total))
    return found


def overlap_plain_loops(masks):
    values = []
    for image in masks.flatten(2).tolist():
        for t, one in enumerate(image):
            for u, other in enumerate(image):
                if t != u:
                    both = sum(a * b for a, b in zip(one, other))
                    values.append(2 * both / (sum(a * a for a in one) + sum(b * b for b in other)))
    return sum(values) / len(values)


def loss_plain_loops(student, teacher, masks, weights):
    total = 0.0
    for s, t, shown, own in zip(student, teacher, masks, weights):
        for mask, weight in zip(shown, own.tolist()):
            m = mask.flatten().tolist()
            for a, b in zip(s.flatten(1).tolist(), t.flatten(1).tolist()):
                squared = sum(k * k * (x - y) ** 2 for k, x, y in zip(m, a, b))
                total += weight * squared / (sum(m) + 1e-5) / len(s)
    return total / len(student)


def test_masks_overlap_and_loss_as_plain_loops():
    student, teacher = torch.randn(2, 2, 3, 4, 5, dtype=torch.float64)
    tokens, weights = torch.randn(4, 3, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64).softmax(1)
    masks = token_masks(tokens, teacher)
    torch.testing.assert_close(masks, masks_plain_loops(tokens, teacher))
    assert overlap(masks).item() == pytest.approx(overlap_plain_loops(masks), rel=1e-9)
    expected = loss_plain_loops(student, teacher, masks, weights)
    assert masked_loss(student, teacher, masks, weights).item() == pytest.approx(expected, rel=1e-9)
    alike = loss_plain_loops(student, teacher, masks, torch.full((2, 4), 0.25))
    assert masked_loss(student, teacher, masks).item() == pytest.approx(alike, rel=1e-9)
    assert masked_loss(teacher, teacher, masks, weights) == 0


def test_the_values_of_the_authors_code():
    """Of MasKD (Apache-2.0; commits a419ccf for detectors, 49de3ae for segmentors) on the closed-form inputs."""
    student, teacher = closed_form_inputs((2, 6, 4, 6))
    tokens, weights = closed_form_inputs((4, 6), (2, 4))
    tokens, weights = 0.1 * tokens, weights.softmax(1)
    masks = token_masks(tokens, teacher)
    assert overlap(masks).item() == pytest.approx(0.9630275, rel=1e-6)
    assert masked_loss(student, teacher, masks, weights).item() == pytest.approx(1.7526009, rel=1e-5)
    both = masks * token_masks(tokens, student)
    assert masked_loss(student, teacher, both, weights).item() == pytest.approx(0.8865586, rel=1e-5)
    assert 0.5 * masked_loss(student, teacher, masks).item() == pytest.approx(0.8825038, rel=1e-5)
    of_segmentor, of_detector = ReceptiveTokens(6, 4, weighted=False), ReceptiveTokens(6, 4)
    with torch.no_grad():
        of_segmentor.tokens.value.copy_(tokens)
        of_detector.tokens.value.copy_(tokens)
        of_detector.bias.value.copy_(weights[0].log())
    assert of_segmentor.mask(teacher)[0].sum().item() == pytest.approx(9.3160820, rel=1e-5)
    expected = (teacher * torch.einsum('t,bthw->bhw', weights[0], masks)[:, None]).sum()
    torch.testing.assert_close(of_detector.mask(teacher)[0].sum(), expected)


def test_masks_that_show_nothing_or_no_common_position():
    masks = torch.zeros(1, 2, 2, 2)
    assert masked_loss(torch.ones(1, 3, 2, 2), torch.zeros(1, 3, 2, 2), masks) == 0
    masks[0, 0, 0], masks[0, 1, 1] = 1, 1
    assert overlap(masks) == 0
    assert overlap(masks[:, [0, 0]]) == 1


def distilled(student, teacher, **options):
    """With a teacher of other weights and channels."""
    model = mmkd.distill(
        models.build(student(), seed=0), models.build(teacher(24), seed=1), dict(it=dict(type='MasKD', **options))
    )
    model.init_weights()
    for module in model.train().modules():  # the same batch again gives the same losses
        if isinstance(module, (nn.BatchNorm2d, nn.Dropout2d)):
            module.eval()
    return model


def batch_of(model, objects=4, images=2):
    shape = (64, 128) if hasattr(model, 'decode_head') else (96, 128)
    return model.data_preprocessor(random_batch(model, (images, 3, *shape), objects), True)


def step(model, batch):
    found = model(**batch, mode='loss')
    return {key: value for key, value in found.items() if key.startswith('it.')}


def total(found):
    return found['it.loss'] + found['it.loss_token']


PAIRS = {
    'retinanet of atss': (detectors.retinanet, detectors.atss),
    'retinanet of faster_rcnn': (detectors.retinanet, detectors.faster_rcnn),
    'pspnet of cascade': (segmentors.pspnet, segmentors.cascade),
}


@pytest.mark.parametrize('pair', PAIRS)
def test_tokens_learn_first_and_stay_then(pair):
    """Whatever momentum and weight decay the optimizer has; in their steps nothing else learns from the method."""
    model = distilled(*PAIRS[pair], token_steps=3, both_begin=2)
    batch, tokens = batch_of(model), model.distillers['it'].tokens
    optimizer = torch.optim.SGD(tokens.parameters(), lr=1e-3, momentum=0.9, weight_decay=10.0)
    kept, history = [], []
    for index in range(7):
        found = step(model, batch)
        history.append({key: value.item() for key, value in found.items()})
        model.zero_grad()
        total(found).backward()
        learning = index < 3
        assert (found['it.loss_token'] > found['it.overlap']) == (found['it.overlap'] > 0) == learning
        assert (found['it.loss'] > 0) != learning
        gradients = [each.grad.abs().sum() > 0 for each in model.backbone.parameters() if each.grad is not None]
        assert any(gradients) != learning
        assert all(each.grad is not None for each in model.distillers.parameters())
        assert any(each.grad.abs().sum() > 0 for each in tokens.parameters()) == learning
        optimizer.step()
        kept.append([each.kept.clone() for each in tokens.modules() if hasattr(each, 'kept')])
    assert not any(torch.equal(*each) for each in zip(kept[1], kept[2]) if each[0].dim() > 1)
    assert not torch.equal(kept[2][0], kept[3][0])  # what the last step made of them
    assert all(torch.equal(*each) for each in zip(kept[3], kept[6]))
    assert not torch.equal(tokens[0].tokens.value, tokens[0].tokens.kept)  # the decay
    assert history[3]['it.loss'] == history[4]['it.loss'] != history[5]['it.loss'] == history[6]['it.loss']
    assert all(each.grad is None for each in model.sources['teacher'].model.parameters())
    assert not model.sources['teacher'].model.training


def test_learning_lowers_what_is_learnt():
    model = distilled(detectors.retinanet, detectors.retinanet, token_steps=20)
    batch = batch_of(model)
    optimizer = torch.optim.Adam(model.distillers['it'].tokens.parameters(), lr=0.01)
    totals = []
    for _ in range(12):
        found = step(model, batch)
        totals.append(total(found).item())
        optimizer.zero_grad()
        total(found).backward()
        optimizer.step()
    assert totals[-1] < totals[0] - 0.5


def test_the_task_is_the_teachers_own():
    """Without masks it is what the teacher says of its own neck, as in training."""
    teacher = models.build(detectors.fcos(24), seed=1).train()
    model = mmkd.distill(models.build(detectors.fcos(), seed=0), teacher, dict(it=dict(type='MasKD')))
    model.init_weights()
    batch = batch_of(model.train())
    for tokens in model.distillers['it'].tokens:
        nn.init.constant_(tokens.bias.value, 0.0)
        tokens.mask = lambda feature, tokens=tokens: (feature + 0 * tokens.tokens.value.sum(), feature.new_zeros(()))
    found = step(model, batch)['it.loss_token']
    expected = sum(value for key, value in teacher(**batch, mode='loss').items() if 'loss' in key)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_images_without_labels_are_left_out_of_the_task():
    model = distilled(detectors.retinanet, detectors.retinanet)
    batch = batch_of(model)

    def task(batch):
        found = step(model, batch)
        total(found).backward()
        return found['it.loss_token'].detach() - found['it.overlap']

    expected = task({'inputs': batch['inputs'][:1], 'data_samples': batch['data_samples'][:1]})
    assert expected > 1
    batch['data_samples'][1].set_metainfo(dict(domain='target'))
    torch.testing.assert_close(task(batch), expected, rtol=1e-4, atol=1e-5)
    batch['data_samples'][0].set_metainfo(dict(domain='target'))
    assert task(batch).abs() < 1e-5


def test_a_teacher_with_a_mask_head_is_one_without_where_labels_are_boxes():
    def teacher(channels):
        config = detectors.faster_rcnn(channels)
        config.type = 'MaskRCNN'
        head = config.roi_head
        head.mask_roi_extractor = copy.deepcopy(head.bbox_roi_extractor)
        head.mask_head = dict(
            type='FCNMaskHead', num_convs=1, in_channels=channels, conv_out_channels=channels, num_classes=3
        )
        config.train_cfg.rcnn.mask_size = 28
        return config

    model = distilled(detectors.retinanet, teacher)
    assert step(model, batch_of(model))['it.loss_token'] > 1
    assert model.sources['teacher'].model.roi_head.with_mask


def test_equal_networks_have_no_distance():
    models_of = [models.build(detectors.retinanet(), seed=0) for _ in range(2)]
    model = mmkd.distill(*models_of, dict(it=dict(type='MasKD', token_steps=0)))
    model.init_weights()
    assert step(model.train(), batch_of(model))['it.loss'] < 1e-5
    assert step(distilled(detectors.retinanet, detectors.retinanet, token_steps=0), batch_of(model))['it.loss'] > 1


def test_the_plain_model_has_nothing_of_it():
    plain = models.build(detectors.retinanet(), seed=0)
    model = distilled(detectors.retinanet, detectors.retinanet)
    step(model, batch_of(model))
    assert any(key.startswith('distillers.it.tokens') for key in model.state_dict())
    assert model.plain().state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize('options', [dict(tokens=1), dict(token_steps=-1), dict(both_begin=0.5), dict(loss_weight='1')])
def test_options_out_of_range_are_errors(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        MasKD(**options)


@pytest.mark.parametrize(
    ('student', 'teacher', 'source', 'options', 'message'),
    [
        ('retinanet', 'retinanet', {}, dict(layer='backbone'), "'backbone': MasKD runs the heads of a RetinaNet"),
        ('pspnet', 'pspnet', {}, dict(layer='decode_head.bottleneck'), "such as 'decode_head.conv_seg'"),
        ('retinanet', 'retinanet', dict(classes={0: 1}), {}, 'its classes are not those of the labels'),
        ('retinanet', 'retinanet', dict(scale=2.0), {}, "size of the student's"),
        ('retinanet', 'retinanet', dict(type='Peer'), {}, 'use a frozen teacher'),
    ],
)
def test_teachers_without_such_a_loss_are_errors(student, teacher, source, options, message):
    family = segmentors if student == 'pspnet' else detectors
    config = getattr(family, teacher)()
    given = dict(config=config if 'type' in source else models.build(config), **source)
    with pytest.raises(ConfigError, match=message):
        mmkd.distill(getattr(family, student)(), given, dict(it=dict(type='MasKD', **options)))


LATE = dict(type='constant', value=1.0, begin=3)


@pytest.mark.parametrize('method', ['MasKD', 'FreeKD'])
@pytest.mark.parametrize(('source', 'factor'), [(dict(begin=3), 1.0), ({}, LATE)])
def test_tokens_that_would_never_learn_are_an_error(method, source, factor):
    """They learn in the first steps or not at all, and masks of random tokens say nothing."""
    student, teacher = detectors.retinanet(), dict(config=models.build(detectors.retinanet()), **source)
    with pytest.raises(ConfigError, match=f'distillers.it: {method} learns in the first 3 steps.*let all begin at 0'):
        mmkd.distill(student, teacher, dict(it=dict(type=method, token_steps=3, factor=factor)))
    for options in (
        dict(token_steps=4, factor=factor),
        dict(token_steps=0, factor=factor),
        dict(token_steps=3, factor=0.0),
    ):
        mmkd.distill(student, teacher, dict(it=dict(type=method, **options)))


def test_so_is_one_of_several_teachers_whose_tokens_would_not_learn():
    student, teachers = detectors.retinanet(), {name: models.build(detectors.retinanet()) for name in 'ab'}
    entry = dict(type='MasKD', token_steps=3, teacher=['a', 'b'], combine=dict(a=1.0, b=LATE))
    with pytest.raises(ConfigError, match='distillers.it: MasKD learns in the first 3 steps.*combine'):
        mmkd.distill(student, teachers, dict(it=entry))
    mmkd.distill(student, teachers, dict(it=dict(entry, combine=dict(a=1.0, b=0.0))))
