import copy
import math

import pytest
import torch
import torch.nn.functional as F

import mmkd
from mmkd.distillers.segmentation.trust import trust
from mmkd.errors import ConfigError
from mmkd.testing import detectors, models, segmentors
from mmkd.testing.batches import random_batch


def test_trust_as_plain_loops():
    logits, labels = 3 * torch.randn(2, 4, 3, 5, dtype=torch.float64), torch.randint(-1, 4, (2, 3, 5))
    found = trust(logits, labels)
    for b in range(2):
        for y in range(3):
            for x in range(5):
                powers = [math.exp(value) for value in logits[b, :, y, x].tolist()]
                label = labels[b, y, x].item()
                expected = powers[label] / sum(powers) if label >= 0 else 1.0
                assert found[b, y, x].item() == pytest.approx(expected, rel=1e-9)


def build(student=None, method='Trust', teacher=None, distillers=None, **options):
    named = dict(a=dict(config=models.build(segmentors.pspnet(24), seed=1).eval(), **options), **(teacher or {}))
    entry = dict(it=dict(type=method, teacher='a')) if distillers is None else distillers
    torch.manual_seed(0)
    model = mmkd.distill(models.build(student or segmentors.pspnet(), seed=0), named, entry)
    for source in model.sources.values():
        source.load()
    return model.train()


def batch_of(model):
    return model.data_preprocessor(random_batch(model, (2, 3, 64, 96)), True)


def losses(model, data):
    torch.manual_seed(0)
    return model(**copy.deepcopy(data), mode='loss')


def expected_trust(model, data):
    """The teacher's probability of each pixel's label, by mmseg's own prediction."""
    teacher = model.sources['a'].model
    inputs = model.sources['a']._renormalize(data['inputs']) if model.sources['a']._renormalize else data['inputs']
    with torch.no_grad():
        logits = teacher.encode_decode(inputs, [sample.metainfo for sample in data['data_samples']])
    labels = torch.cat([sample.gt_sem_seg.data for sample in data['data_samples']])
    probability = logits.softmax(1).gather(1, labels.where(labels < 19, 0)[:, None])[:, 0]
    return probability.where(labels < 19, 1.0), labels


def test_the_students_own_cross_entropy_counts_as_far_as_the_teacher_agrees():
    """Of the decode head and of the auxiliary one; the term of the teacher is KD's."""
    model, kd = build(), build(method='KD')
    data = batch_of(model)
    weights, labels = expected_trust(model, data)
    seen = []
    hooks = [
        head.conv_seg.register_forward_hook(lambda *args: seen.append(args[2]))
        for head in (model.decode_head, model.auxiliary_head)
    ]
    found, plain = losses(model, data), losses(kd, data)
    [hook.remove() for hook in hooks]
    for head, logits in zip(('decode', 'aux'), seen):
        at_labels = F.interpolate(logits, labels.shape[1:], mode='bilinear')
        own = F.cross_entropy(at_labels, labels, reduction='none', ignore_index=255)
        weight = (model.decode_head if head == 'decode' else model.auxiliary_head).loss_decode.loss_weight
        torch.testing.assert_close(found[f'{head}.loss_ce'], weight * (own * weights).mean())
        torch.testing.assert_close(plain[f'{head}.loss_ce'], weight * own.mean())
    torch.testing.assert_close(found['it.loss'], plain['it.loss'])
    assert model.decode_head.sampler is None


def task(found):
    return {key: value for key, value in found.items() if key.endswith('loss_ce')}


def test_a_teacher_that_agrees_with_all_changes_nothing_and_one_that_agrees_with_none_leaves_nothing():
    for scale, expected in ((0.0, 1 / 19), (None, 1.0)):
        model, kd = build(), build(method='KD')
        data = batch_of(model)
        if scale is None:
            model.distillers['it'].label_weights = lambda taps, samples: torch.ones(2, 64, 96)
        else:
            head = model.sources['a'].model.decode_head.conv_seg
            head.weight.zero_(), head.bias.zero_()
        found, plain = task(losses(model, data)), task(losses(kd, data))
        for key in plain:
            torch.testing.assert_close(found[key], plain[key] * expected)


def test_in_steps_without_the_teacher_labels_count_fully():
    weight = dict(type='constant', value=1.0, begin=1)
    model, kd = build(distillers=dict(it=dict(type='Trust', loss_weight=weight))), build(method='KD')
    data = batch_of(model)
    expected = task(losses(kd, data))
    first, second = task(losses(model, data)), task(losses(model, data))
    for key in expected:
        torch.testing.assert_close(first[key], expected[key])
        assert second[key] < 0.9 * expected[key]


def test_labels_that_the_teacher_does_not_know_count_fully():
    model, kd = build(classes={index: index for index in range(3)}), build(method='KD')
    data = batch_of(model)
    for sample in data['data_samples']:
        sample.gt_sem_seg.data.fill_(7)
    found, plain = task(losses(model, data)), task(losses(kd, data))
    for key in plain:
        torch.testing.assert_close(found[key], plain[key])
    for sample in data['data_samples']:
        sample.gt_sem_seg.data.fill_(1)
    assert task(losses(model, data))['decode.loss_ce'] < 0.7 * task(losses(kd, data))['decode.loss_ce']


def test_a_sampler_of_the_heads_own_is_kept():
    config = segmentors.pspnet()
    config.decode_head.sampler = dict(type='OHEMPixelSampler', thresh=0.7, min_kept=100)
    model, kd = build(copy.deepcopy(config)), build(copy.deepcopy(config), method='KD')
    data = batch_of(model)
    own = model.decode_head.sampler
    found, plain = task(losses(model, data)), task(losses(kd, data))
    assert 0 < found['decode.loss_ce'] < plain['decode.loss_ce']
    assert model.decode_head.sampler is own


def test_it_is_gone_with_the_distillers():
    model = build()
    losses(model, batch_of(model))
    plain = model.plain()
    assert type(plain).__name__ == 'EncoderDecoder'
    assert plain.decode_head.sampler is None


def dice():
    config = segmentors.pspnet()
    config.auxiliary_head.loss_decode = dict(type='DiceLoss')
    return config


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(student=dice()), 'auxiliary_head.loss_decode: DiceLoss takes no weight for each pixel'),
        (
            dict(distillers=dict(it=dict(type='Trust', teacher=['a', 'b'])), teacher=dict(b=dict(type='Average'))),
            'Trust weighs the labels of the student by one teacher',
        ),
        (
            dict(distillers=dict(it=dict(type='Trust', teacher='b')), teacher=dict(b=dict(type='Own'))),
            'Trust weighs the labels of the student by one teacher',
        ),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ConfigError, match=message) as error:
        build(**options)
    assert '\n' not in str(error.value)


def test_a_detector_is_refused():
    teacher = dict(config=models.build(detectors.retinanet(), seed=1))
    with pytest.raises(ConfigError, match='RetinaNet is no segmentor, and Trust weighs the label of each pixel'):
        mmkd.distill(models.build(detectors.retinanet(), seed=0), teacher, dict(it=dict(type='Trust')))
