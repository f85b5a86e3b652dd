import math

import pytest
import torch
import torch.nn.functional as F

import mmkd
from mmkd.distillers.generic.kd import pixel_divergence
from mmkd.distillers.segmentation.wsld import soft_label_weights
from mmkd.errors import ConfigError
from mmkd.testing import detectors, models, segmentors
from mmkd.testing.batches import random_batch


def cross_entropy(logits, label):
    return math.log(sum(math.exp(value) for value in logits)) - logits[label]


def test_the_weights_as_plain_loops():
    student, teacher = 3 * torch.randn(2, 2, 5, 3, 4, dtype=torch.float64)
    labels = torch.randint(-1, 5, (2, 3, 4))
    found = soft_label_weights(student, teacher, labels)
    assert not found.requires_grad
    for b in range(2):
        for y in range(3):
            for x in range(4):
                label = labels[b, y, x].item()
                pair = [cross_entropy(each[b, :, y, x].tolist(), label) for each in (student, teacher)]
                expected = 1 - math.exp(-pair[0] / pair[1]) if label >= 0 else 1.0
                assert found[b, y, x].item() == pytest.approx(expected, rel=1e-9)


def test_its_ends():
    """Both as sure; the student sure; the teacher sure; both so sure that nothing is left to compare."""
    sure, guess = [200.0, 0.0], [0.0, 0.0]
    student = torch.tensor([guess, sure, guess, sure])
    teacher = torch.tensor([guess, guess, sure, sure])
    found = soft_label_weights(student, teacher, torch.zeros(4, dtype=torch.long))
    assert found.tolist() == pytest.approx([1 - math.exp(-1), 0.0, 1.0, 0.0])


def build(entry, make=segmentors.pspnet, teachers=('a',), same=False, **options):
    named = {
        name: dict(config=models.build(segmentors.pspnet(24), seed=seed).eval(), **options)
        for seed, name in enumerate(teachers, 1)
    }
    model = mmkd.distill(models.build(make(), seed=0), named, dict(it=entry))
    for source in model.sources.values():
        source.load()
    return model.train()


def found(model, seed=0):
    data = model.data_preprocessor(random_batch(model, (2, 3, 64, 96)), True)
    torch.manual_seed(0)
    return model(**data, mode='loss')['it.loss']


def test_it_is_kd_with_these_weights():
    model = build(dict(type='WSLD'))
    seen = []
    own = model.distillers['it'].read
    model.distillers['it'].read = lambda *given: seen.extend(own(*given)) or seen
    loss = found(model)
    (each,) = seen
    count = each.valid.sum()
    assert 0 < count < each.valid.numel()
    divergence = F.kl_div(
        (each.student / 2).log_softmax(1), (each.teacher / 2).log_softmax(1), reduction='none', log_target=True
    ).sum(1)
    torch.testing.assert_close(loss, 2.5 * 4 * (divergence * each.weights * each.valid).sum() / count)
    assert loss < 2.5 * pixel_divergence(each.student, each.teacher, 2.0, valid=each.valid)
    loss.backward()
    assert model.decode_head.conv_seg.weight.grad.abs().sum() > 0


def test_several_teachers_weigh_their_own_pixels():
    each = [found(build(dict(type='WSLD', teacher=name), teachers='ab')) for name in 'ab']
    mean = found(build(dict(type='WSLD', teacher=['a', 'b']), teachers='ab'))
    torch.testing.assert_close(mean, sum(each) / 2)
    by_entropy = found(build(dict(type='WSLD', teacher=['a', 'b'], combine='entropy'), teachers='ab'))
    kd = found(build(dict(type='KD', tau=2.0, loss_weight=2.5, teacher=['a', 'b'], combine='entropy'), teachers='ab'))
    assert min(each) * 0.9 < by_entropy < max(each) * 1.1
    assert by_entropy < kd


@pytest.mark.parametrize('combine', ['mean_logits', 'best', 'min_logits'])
def test_one_target_of_several_teachers_has_weights_of_its_own(combine):
    """It is the same whichever teacher is named first."""
    each = [
        found(build(dict(type='WSLD', teacher=list(names), combine=combine), teachers='ab')) for names in ('ab', 'ba')
    ]
    torch.testing.assert_close(*each)


def test_a_class_that_the_teacher_does_not_know_is_no_label():
    model = build(dict(type='WSLD'), classes={index: index for index in range(3)})
    seen = []
    own = model.distillers['it'].read
    model.distillers['it'].read = lambda *given: seen.extend(own(*given)) or seen
    found(model)
    labels = model.distillers['it'].reader
    assert labels.has_labels
    assert (seen[0].weights == 1).any()
    assert seen[0].student.shape[1] == 3


def test_a_detector_is_refused():
    teacher = dict(config=models.build(detectors.retinanet(), seed=1))
    with pytest.raises(ConfigError, match='RetinaNet is no segmentor, and WSLD weighs by the label of each pixel'):
        mmkd.distill(models.build(detectors.retinanet(), seed=0), teacher, dict(it=dict(type='WSLD')))
