"""One method, several teachers: how much is learnt from each."""

import copy
import math

import pytest
import torch

import mmkd
from mmkd.classes import ClassMap
from mmkd.distillers.several import best_logits, drop_weights, entropy_weights, label_weights, mean_logits, min_logits
from mmkd.errors import ConfigError
from mmkd.hosts.class_logits import ClassLogits
from mmkd.testing import detectors, models, segmentors
from mmkd.testing.batches import random_batch

HOSTS = {'detector': detectors.retinanet, 'two stages': detectors.faster_rcnn, 'segmentor': segmentors.pspnet}


def build(make, names, entry, seeds=(1, 2, 3), **sources):
    """A student of several teachers with weights of their own, by name."""
    networks = {name: models.build(make(), seed=seed).eval() for name, seed in zip('abc', seeds)}
    teachers = {name: dict(config=networks[name], **sources) for name in names}
    model = mmkd.distill(models.build(make(), seed=0), teachers, dict(it=entry))
    for source in model.sources.values():
        source.load()
    return model.train()


def losses(model):
    data = model.data_preprocessor(random_batch(model, (2, 3, 64, 96)), True)
    torch.manual_seed(0)
    return {key: value for key, value in model(**data, mode='loss').items() if key.startswith('it.')}


def entry(names, **options):
    return dict(dict(type='KD', teacher=list(names)), **options)


def combinations(make):
    yield from ('mean', 'entropy', dict(type='drop', p=0.0), 'mean_logits')
    if make is segmentors.pspnet:
        yield from ('labels', 'best', 'min_logits')


CASES = [(name, combine) for name, make in HOSTS.items() for combine in combinations(make)]


@pytest.mark.parametrize(('host', 'combine'), CASES)
def test_one_teacher_given_twice_equals_one(host, combine):
    make = HOSTS[host]
    once = losses(build(make, 'a', dict(type='KD')))['it.loss']
    twice = losses(build(make, 'ab', entry('ab', combine=combine), seeds=(1, 1)))['it.loss']
    torch.testing.assert_close(twice, once)


@pytest.mark.parametrize(('host', 'combine'), CASES)
def test_the_order_of_teachers_changes_nothing(host, combine):
    make = HOSTS[host]
    found = losses(build(make, 'abc', entry('abc', combine=combine)))['it.loss']
    torch.testing.assert_close(losses(build(make, 'cab', entry('cab', combine=combine)))['it.loss'], found)


def test_a_mean_is_that_of_each():
    each = [losses(build(segmentors.pspnet, name, dict(type='KD')))['it.loss'] for name in 'abc']
    found = losses(build(segmentors.pspnet, 'abc', entry('abc')))['it.loss']
    torch.testing.assert_close(found, sum(each) / 3)
    fixed = losses(build(segmentors.pspnet, 'abc', entry('abc', combine=dict(a=0.5, b=0.25, c=2.0))))['it.loss']
    torch.testing.assert_close(fixed, 0.5 * each[0] + 0.25 * each[1] + 2 * each[2])


def test_features_have_an_adapter_for_each_teacher():
    networks = dict(a=detectors.retinanet(channels=24), b=detectors.retinanet(channels=20))
    teachers = {name: dict(config=models.build(each, seed=1)) for name, each in networks.items()}
    distillers = dict(it=dict(type='CWD', layer='neck', teacher=['a', 'b']))
    model = mmkd.distill(models.build(detectors.retinanet(), seed=0), teachers, distillers)
    shapes = [
        tuple(each.shape[:2]) for name, each in model.distillers.named_parameters() if name.endswith('conv.weight')
    ]
    assert shapes == [(24, 16)] * 3 + [(20, 16)] * 3
    for source in model.sources.values():
        source.load()
    losses(model.train())['it.loss'].backward()
    assert all(each.grad.any() for name, each in model.distillers.named_parameters() if name.endswith('conv.weight'))


def test_weights_of_a_schedule():
    decaying = dict(type='linear', start=1.0, value=0.0, end=2)
    model = build(segmentors.pspnet, 'ab', entry('ab', combine=dict(a=1.0, b=decaying)))
    alone = losses(build(segmentors.pspnet, 'a', dict(type='KD')))['it.loss']
    found = [losses(model)['it.loss'] for _ in range(3)]
    assert found[0] > found[1] > found[2]
    torch.testing.assert_close(found[2], alone, rtol=0.02, atol=0)  # after two steps of batch norm statistics


def softmax(values):
    powers = [math.exp(value) for value in values]
    return [each / sum(powers) for each in powers]


@pytest.mark.parametrize('teachers', [2, 3])
def test_entropy_weights_as_plain_loops(teachers):
    logits = 3 * torch.randn(teachers, 2, 5, 3, dtype=torch.float64)
    found = entropy_weights([ClassLogits(each, each, sigmoid=False) for each in logits])
    for b in range(2):
        for x in range(3):
            h = [-sum(p * math.log(p) for p in softmax(logits[m, b, :, x].tolist())) for m in range(teachers)]
            for m in range(teachers):
                assert found[m][b, x].item() == pytest.approx((1 - h[m] / sum(h)) / (teachers - 1))


def test_label_weights_as_plain_loops():
    logits = 3 * torch.randn(3, 2, 5, 4, dtype=torch.float64)
    labels = torch.tensor([[0, 4, -1, 2], [1, 1, 3, -1]])
    found = label_weights([ClassLogits(each, each, sigmoid=False) for each in logits], labels)
    for b in range(2):
        for x in range(4):
            y = labels[b, x].item()
            entropies = [-math.log(softmax(logits[m, b, :, x].tolist())[y]) for m in range(3)]
            expected = [1 / 3] * 3 if y < 0 else [(1 - each) / 2 for each in softmax(entropies)]
            assert [each[b, x].item() for each in found] == pytest.approx(expected)


def some_logits():
    """Of three networks at 2 x 4 positions, and their labels."""
    return 3 * torch.randn(3, 2, 5, 4, dtype=torch.float64), torch.tensor([[0, 4, -1, 2], [1, 1, 3, -1]])


def test_one_target_of_all_as_plain_loops():
    logits, labels = some_logits()
    mean, best, smallest = (make(logits, labels) for make in (mean_logits, best_logits, min_logits))
    for b in range(2):
        for x in range(4):
            z, y = [each[b, :, x].tolist() for each in logits], labels[b, x].item()
            average = [sum(each[k] for each in z) / 3 for k in range(5)]
            assert mean[b, :, x].tolist() == pytest.approx(average)
            knows = max(z, key=lambda each: softmax(each)[y])
            assert best[b, :, x].tolist() == pytest.approx(average if y < 0 else knows)
            least = [min(each[k] - each[y] for each in z) for k in range(5)]
            assert smallest[b, :, x].tolist() == pytest.approx(average if y < 0 else least)


def test_the_smallest_logits_know_the_label_at_least_as_well_as_the_best():
    logits, labels = some_logits()
    known = labels.clamp(min=0)
    found, best = (
        torch.nn.functional.cross_entropy(make(logits, known), known, reduction='none')
        for make in (min_logits, best_logits)
    )
    assert (found <= best).all()
    torch.testing.assert_close(
        best,
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), known.repeat(3, 1), reduction='none')
        .unflatten(0, (3, 2))
        .amin(0),
    )


def collaborative(host, combine):
    """KDCL: the student and a peer, each of which learns from one target of both."""
    entry = dict(type='KD', teacher=['own', 'peer'], combine=combine, tau=2.0)
    model = mmkd.distill(
        models.build(HOSTS[host](), seed=0),
        dict(peer=dict(type='Peer', config=HOSTS[host]()), own=dict(type='Own')),
        dict(down=entry, up=dict(entry, learner='peer')),
    )
    model.init_weights()
    return model.train()


CLASSIFIERS = {
    'detector': 'bbox_head.retina_cls',
    'two stages': 'roi_head.bbox_head.fc_cls',
    'segmentor': 'decode_head.conv_seg',
}


@pytest.mark.parametrize(('host', 'combine'), [(h, c) for h, c in CASES if c in ('mean_logits', 'best', 'min_logits')])
def test_who_learns_from_one_target_of_all_gets_the_gradient_alone(host, combine):
    model = collaborative(host, combine)
    data = model.data_preprocessor(random_batch(model, (2, 3, 64, 96)), True)
    found = model(**data, mode='loss')
    weights = [each.get_submodule(CLASSIFIERS[host]).weight for each in (model, model.sources['peer'].model)]
    for learns, name in enumerate(('down', 'up')):
        gradients = torch.autograd.grad(found[f'{name}.loss'], weights, allow_unused=True, retain_graph=True)
        assert gradients[learns].abs().sum() > 0
        assert gradients[1 - learns] is None


def test_a_network_that_equals_its_peer_has_nothing_to_learn():
    model = collaborative('segmentor', 'mean_logits')
    peer = model.sources['peer'].model
    peer.load_state_dict({name: value for name, value in model.state_dict().items() if not name.startswith('sources')})
    model.eval()  # without dropout
    data = model.data_preprocessor(random_batch(model, (2, 3, 64, 96)), True)
    found = model(**data, mode='loss')
    assert found['down.loss'].abs() < 1e-6
    assert found['up.loss'].abs() < 1e-6


def test_a_network_alone_is_not_its_own_target():
    with pytest.raises(ConfigError, match='would be compared with itself'):
        mmkd.distill(
            models.build(segmentors.pspnet()),
            dict(own=dict(type='Own')),
            dict(it=dict(type='KD', teacher=['own'], combine='mean_logits')),
        )


def test_one_target_has_the_classes_of_all():
    teachers = {name: dict(config=models.build(segmentors.pspnet(), seed=1)) for name in 'ab'}
    teachers['b']['classes'] = {0: 1, 1: 0}
    with pytest.raises(ConfigError, match="combine='min_logits': makes one target of all, and b has other classes"):
        mmkd.distill(models.build(segmentors.pspnet()), teachers, dict(it=entry('ab', combine='min_logits')))


def test_of_sigmoid_scores_each_class_is_weighed_among_those_who_know_it():
    maps = [ClassMap((0, 1), (0, 1)), ClassMap((1, 2), (1, 0))]
    logits = [ClassLogits(each, each, True, None, of) for each, of in zip(torch.randn(2, 2, 2, 6), maps)]
    first, second = entropy_weights(logits)
    assert torch.equal(first[:, 0], torch.ones(2, 6))  # nobody else knows it
    assert torch.equal(second[:, 1], torch.ones(2, 6))
    torch.testing.assert_close(first[:, 1] + second[:, 0], torch.ones(2, 6))
    assert ((first[:, 1] > 0) & (first[:, 1] < 1)).all()


def test_teachers_that_are_sure_of_all_have_equal_weights():
    sure = torch.tensor([1000.0, 0.0]).reshape(1, 2, 1)
    found = entropy_weights([ClassLogits(sure, sure, sigmoid=False)] * 2)
    assert [each.item() for each in found] == [0.5, 0.5]


def test_dropping_keeps_the_largest_loss():
    torch.manual_seed(0)
    drawn = torch.stack([drop_weights(torch.tensor([1.0, 3.0, 2.0]), 0.5) for _ in range(400)])
    assert (drawn[:, 1] > 0).all()
    torch.testing.assert_close(drawn.sum(1), torch.ones(400))
    assert (drawn[:, [0, 2]] > 0).float().mean(0).tolist() == pytest.approx([0.5, 0.5], abs=0.1)
    assert drop_weights(torch.tensor([1.0, 3.0, 2.0]), 1.0).tolist() == [0, 1, 0]
    torch.testing.assert_close(drop_weights(torch.tensor([1.0, 3.0, 2.0]), 0.0), torch.full((3,), 1 / 3))


def test_specialists_teach_a_student_of_all_classes():
    """Each class of the union is taught by who knows it."""
    make = detectors.retinanet
    specialists = dict(a=dict(classes={0: 0, 1: 1}), b=dict(classes={2: 0}))
    networks = {name: models.build(make(classes=len(each['classes'])), seed=4) for name, each in specialists.items()}
    teachers = {name: dict(config=networks[name], **each) for name, each in specialists.items()}
    found = {}
    for combine in ('mean', 'entropy'):
        model = mmkd.distill(models.build(make(), seed=0), teachers, dict(it=entry('ab', combine=combine)))
        for source in model.sources.values():
            source.load()
        losses(model.train())['it.loss'].backward()
        found[combine] = model.bbox_head.retina_cls.weight.grad.unflatten(0, (-1, 3)).abs().sum((0, 2, 3, 4))
        assert (found[combine] > 0).all()
    # the mean divides what only one of two says
    torch.testing.assert_close(found['entropy'], 2 * found['mean'])


def test_what_the_combination_learns_is_in_the_checkpoint_once():
    model = build(detectors.retinanet, 'ab', dict(type='MGD', layer='neck', teacher=['a', 'b']))
    keys = [key for key in model.state_dict() if key.startswith('distillers')]
    assert keys
    assert all(key.startswith(('distillers.it.methods.a.', 'distillers.it.methods.b.')) for key in keys)
    again = copy.deepcopy(model)
    again.load_state_dict(model.state_dict())


def test_a_method_that_was_built_learns_from_one():
    model = models.build(detectors.retinanet())
    made = mmkd.distillers.CWD('neck')
    with pytest.raises(ConfigError, match='there are several teachers, a, b'):
        mmkd.distill(model, dict(a=copy.deepcopy(model), b=copy.deepcopy(model)), dict(it=made))


def test_teachers_that_are_read_in_other_steps_are_refused():
    teachers = {name: dict(config=models.build(detectors.retinanet(), seed=1)) for name in 'ab'}
    teachers['b']['interval'] = 2
    with pytest.raises(ConfigError, match='its teachers a, b have other interval, begin or end'):
        mmkd.distill(models.build(detectors.retinanet()), teachers, dict(it=entry('ab')))


def test_teachers_of_other_positions_cannot_be_weighed_there():
    for make in (detectors.retinanet, segmentors.pspnet):
        teachers = {name: dict(config=models.build(make(), seed=1)) for name in 'ab'}
        teachers['b']['scale'] = 2.0
        with pytest.raises(
            ConfigError, match="combine='entropy': takes teachers position by position, and theirs differ"
        ):
            mmkd.distill(models.build(make()), teachers, dict(it=entry('ab', combine='entropy')))
        mmkd.distill(models.build(make()), teachers, dict(it=entry('ab')))


def test_nothing_is_computed_where_all_weights_are_0():
    off = dict(type='constant', value=0.0)
    for combine, weight in ((dict(a=off, b=off), 1.0), (dict(a=1.0, b=1.0), off)):
        model = build(segmentors.pspnet, 'ab', entry('ab', combine=combine, loss_weight=weight))
        assert not model.distillers.wants('a')
        assert losses(model) == {}


def test_one_of_several_is_not_compared_with_itself():
    teacher = dict(config=models.build(detectors.retinanet(), seed=1))
    distillers = dict(it=dict(type='AT', layer='neck', teacher=['own', 't']))
    with pytest.raises(ConfigError, match="layer 'neck' would be compared with itself"):
        mmkd.distill(models.build(detectors.retinanet()), dict(own=dict(type='Own'), t=teacher), distillers)
