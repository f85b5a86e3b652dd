"""What a student learns from: one teacher, several, its average, a peer, itself."""

import copy

import pytest
import torch
from torch import nn

import mmkd
from mmkd.distillers import CWD, Distiller
from mmkd.errors import ConfigError
from mmkd.sources import Average, Own, Source, Teacher
from mmkd.taps import Taps
from mmkd.testing import detectors, models, segmentors
from mmkd.testing.batches import random_batch

CWD_NECK = dict(type='CWD', layer='neck')


def student(**options):
    return models.build(detectors.retinanet(**options), seed=0)


def losses(model, seed=0):
    data = model.data_preprocessor(random_batch(model, (2, 3, 96, 128), seed=seed), True)
    return model(**data, mode='loss')


def step(model, optimizer, seed=0):
    found = losses(model, seed)
    optimizer.zero_grad()
    model.parse_losses(found)[0].backward()
    optimizer.step()
    return found


def other_teacher(tmp_path):
    """Of another family, width and normalization."""
    config = detectors.gfl(channels=20)
    config['data_preprocessor'].update(mean=[103.5, 116.3, 123.7], std=[1.0, 1.0, 1.0], bgr_to_rgb=False)
    return dict(config=config, checkpoint=models.save_weights(config, tmp_path / 'gfl.pth', seed=3))


# --- several teachers


def test_two_teachers_of_different_families_and_normalizations(teacher_options, tmp_path):
    """Each says what it says alone."""
    teachers = dict(large=teacher_options, other=other_teacher(tmp_path))
    torch.manual_seed(0)
    both = mmkd.distill(
        student(), teachers, dict(one=dict(CWD_NECK, teacher='large'), two=dict(CWD_NECK, teacher='other'))
    )
    both.init_weights()
    found = losses(both)
    for entry, name in (('one', 'large'), ('two', 'other')):
        alone = mmkd.distill(student(), teachers[name], {entry: CWD_NECK})
        alone.init_weights()
        alone.distillers.load_state_dict(
            {key: value for key, value in both.distillers.state_dict().items() if key.startswith(entry)}
        )
        torch.testing.assert_close(found[f'{entry}.loss'], losses(alone)[f'{entry}.loss'], rtol=0, atol=0)
    assert found['one.loss'] != found['two.loss']


def test_one_teacher_given_twice_equals_one_with_the_sum_of_the_weights(teacher_options):
    layer = dict(type='AT', layer='neck')
    twice = mmkd.distill(
        student(),
        dict(a=teacher_options, b=copy.deepcopy(teacher_options)),
        dict(one=dict(layer, teacher='a', loss_weight=30.0), two=dict(layer, teacher='b', loss_weight=70.0)),
    )
    once = mmkd.distill(student(), teacher_options, dict(at=dict(layer, loss_weight=100.0)))
    found, expected = {}, {}
    for model, results in ((twice, found), (once, expected)):
        model.init_weights()
        results.update(losses(model))
        model.parse_losses(results)[0].backward()
    torch.testing.assert_close(found['one.loss'] + found['two.loss'], expected['at.loss'])
    gradients = [model.backbone.layer4[0].conv1.weight.grad for model in (twice, once)]
    torch.testing.assert_close(*gradients)


class Mean(Distiller):
    """Learns from the mean of several teachers."""

    student_layers = teacher_layers = ('bbox_head.retina_cls',)
    several_teachers = True

    def forward(self, student, teacher, data_samples):
        (layer,) = self.student_layers
        levels = zip(student[layer], *(taps[layer] for taps in teacher.values()), strict=True)
        return {'loss': sum((s - sum(t) / len(t)).square().mean() for s, *t in levels)}


def test_a_method_learns_from_several_teachers_at_once(teacher_options, tmp_path):
    second = dict(
        teacher_options, checkpoint=models.save_weights(teacher_options['config'], tmp_path / '2.pth', seed=5)
    )
    entry = dict(type=f'{__name__}.Mean', teacher=['a', 'b'])
    model = mmkd.distill(student(), dict(a=teacher_options, b=second), dict(mean=entry))
    model.init_weights()
    data = model.data_preprocessor(random_batch(model, (2, 3, 96, 128)), True)
    layer = 'bbox_head.retina_cls'
    teachers = [model.sources[name](**data)[layer] for name in 'ab']
    with torch.no_grad(), Taps(model, [layer]) as own:
        found = model(**data, mode='loss')['mean.loss']
    expected = sum((s - (t + u) / 2).square().mean() for s, t, u in zip(own[layer], *teachers, strict=True))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ('entry', 'message'),
    [
        (dict(CWD_NECK), r"distillers.cwd: there are several teachers, a, b; name one, as in teacher='a'"),
        (dict(CWD_NECK, teacher='c'), "distillers.cwd: teacher='c': there is none; there are a, b"),
        (dict(CWD_NECK, teacher=['a', 'a']), 'expected a name, or a list of names, each once'),
        (dict(CWD_NECK, teacher='a', combine='mean'), "combine='mean': there is one teacher"),
        (
            dict(CWD_NECK, teacher=['a', 'b'], combine='entropy'),
            "combine='entropy': reads class logits, which CWD does not",
        ),
        (
            dict(CWD_NECK, teacher=['a', 'b'], combine='median'),
            "combine='median': expected one of mean, entropy, labels, drop",
        ),
        (dict(CWD_NECK, teacher=['a', 'b'], combine=dict(a=1.0)), 'expected a weight for each of its teachers, a, b'),
        (dict(CWD_NECK, teacher=['a', 'b'], combine=dict(type='drop', p=2)), 'combine: p=2: expected a probability'),
        (dict(type='KD', teacher=['a', 'b'], combine='labels'), "combine='labels': takes a segmentor"),
        (dict(CWD_NECK, teacher='a', learner='b'), "learner='b' is not trained; a Peer is"),
    ],
)
def test_which_teacher_has_to_be_said(teacher_options, entry, message):
    with pytest.raises(ConfigError, match=message):
        mmkd.distill(student(), dict(a=teacher_options, b=teacher_options), dict(cwd=entry))


def test_a_distiller_and_a_teacher_of_one_name_are_refused(teacher_options):
    with pytest.raises(ConfigError, match='distillers.a: a teacher has this name'):
        mmkd.distill(student(), dict(a=teacher_options), dict(a=CWD_NECK))


# --- when a source is read


class Counting(Source):
    """A teacher that counts how often it is read."""

    def __init__(self, model, **options):
        super().__init__(**options)
        self.model, self.reads = model, []

    def read(self, student, inputs, data_samples):
        self.reads.append(student.distillers.iteration)
        with torch.no_grad(), Taps(self.model, self.layers) as taps:
            self.model.extract_feat(inputs)
        return taps, {}


@pytest.mark.parametrize(
    ('options', 'loss_weight', 'expected'),
    [
        (dict(), 1.0, [0, 1, 2, 3, 4, 5]),
        (dict(interval=2), 1.0, [0, 2, 4]),
        (dict(begin=1, end=4, interval=2), 1.0, [1, 3]),
        (dict(), dict(type='constant', value=1.0, begin=2, end=4), [2, 3]),
        (dict(), dict(type='linear', value=1.0, end=3), [1, 2, 3, 4, 5]),
        (dict(), 0.0, []),
    ],
)
def test_a_source_that_nobody_learns_from_in_a_step_is_not_read(options, loss_weight, expected):
    """Its distiller's loss is left out, and its adapter keeps its place in the graph."""
    source = Counting(models.build(detectors.retinanet(channels=24), seed=1).eval(), **options)
    model = mmkd.distill(student(), source, dict(cwd=dict(CWD_NECK, loss_weight=loss_weight))).train()
    for iteration in range(6):
        found = losses(model)
        model.zero_grad()
        model.parse_losses(found)[0].backward()
        assert (found['cwd.loss'] != 0) == (iteration in expected)
        assert all(each.grad is not None for each in model.distillers.parameters())
    assert source.reads == expected


def test_a_schedule_follows_the_steps_of_a_plain_loop(teacher_options):
    ramp = dict(type='linear', value=4.0, end=4)
    entry = dict(type='AT', layer='neck')
    model, plain = (
        mmkd.distill(student(), teacher_options, dict(at=dict(entry, loss_weight=weight))) for weight in (ramp, 1.0)
    )
    for each in (model, plain):
        each.init_weights()
    expected = losses(plain)['at.loss'].item()
    found = [losses(model).get('at.loss') for _ in range(6)]
    assert found[0] is None  # the weight is 0, so the teacher is not read
    assert [each.item() / expected for each in found[1:]] == pytest.approx([1, 2, 3, 4, 4], rel=1e-4)
    assert losses(model.eval())['at.loss'].item() > 0
    assert model.distillers.iteration == 5  # a loss in eval mode is no training step


# --- the student's average


def test_the_average_is_that_of_the_students_weights(teacher_options):
    model = mmkd.distill(
        student(), dict(mean=dict(type='Average', momentum=0.6)), dict(at=dict(type='AT', layer='neck'))
    )
    model.init_weights()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    names = [name for name, _ in model.sources['mean'].model.named_parameters()]
    names += ['backbone.bn1.running_mean']
    expected = None
    for iteration in range(4):
        own = {name: model.state_dict()[name].clone() for name in names}
        momentum = min(0.6, iteration / (iteration + 1))
        expected = {
            name: own[name] if expected is None else momentum * expected[name] + (1 - momentum) * own[name]
            for name in names
        }
        before = model.sources['mean'].kept.steps.item()
        found = step(model.train(), optimizer, seed=iteration)
        assert model.sources['mean'].kept.steps == before + 1
        average = model.sources['mean'].model.state_dict()
        for name in names:
            torch.testing.assert_close(average[name], expected[name], rtol=1e-5, atol=1e-6)
    assert found['at.loss'] > 0
    assert not any(module.training for module in model.sources['mean'].model.modules())
    assert not any(each.requires_grad for each in model.sources['mean'].model.parameters())
    assert 'sources.mean.model.backbone.conv1.weight' in model.state_dict()


def test_the_average_counts_steps_of_the_optimizer_and_not_passes():
    model = mmkd.distill(student(), dict(mean=dict(type='Average')), dict(at=dict(type='AT', layer='neck'))).train()
    for _ in range(3):  # as with accumulated gradients
        losses(model)
    assert model.sources['mean'].kept.steps == 1


# --- the student of some steps ago


def snapshots(**options):
    entry = dict(type='AT', layer='neck', loss_weight=options.pop('loss_weight', 1.0))
    model = mmkd.distill(student(), dict(before=dict(type='Snapshot', cycle=2, **options)), dict(at=entry))
    model.init_weights()
    return model.train()


@pytest.mark.parametrize(
    ('options', 'expected'),
    [
        (dict(), [2, 3, 4, 5, 6]),
        (dict(interval=3), [2, 5]),  # in some of which it was copied, and in others not
        (dict(begin=3, end=6), [3, 4, 5]),
        (dict(loss_weight=dict(type='linear', value=1.0, begin=2, end=4)), [3, 4, 5, 6]),
    ],
)
def test_a_snapshot_is_the_student_at_the_end_of_the_last_cycle(options, expected):
    model = snapshots(**options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    names = ['backbone.conv1.weight', 'bbox_head.retina_cls.bias', 'backbone.bn1.running_mean']
    kept, read = None, []
    for iteration in range(7):
        if iteration and iteration % 2 == 0:
            kept = {name: model.state_dict()[name].clone() for name in names}
        if 'at.loss' in step(model, optimizer, seed=iteration):
            read.append(iteration)
        if kept:
            found = model.sources['before'].model.state_dict()
            assert all(torch.equal(found[name], value) for name, value in kept.items())
    assert read == expected
    assert not any(module.training for module in model.sources['before'].model.modules())
    assert not any(each.requires_grad for each in model.sources['before'].model.parameters())
    assert 'sources.before.model.backbone.conv1.weight' in model.state_dict()


def test_a_snapshot_of_the_same_weights_has_nothing_to_teach():
    model = snapshots()
    state = model.state_dict()
    moved = {name: value + 1 for name, value in state.items() if name.startswith('sources.') and 'conv1' in name}
    model.load_state_dict(state | moved)
    model.distillers.iteration = 2
    assert losses(model)['at.loss'] > 0  # in step 3 it is as it was loaded
    assert losses(model)['at.loss'] == 0  # in step 4 it is taken anew
    model.load_state_dict(state | moved)
    assert losses(model.eval())['at.loss'] > 0  # a loss in eval mode is no training step


# --- the student itself


def test_deeper_layers_teach_shallower_ones_of_the_student():
    entry = dict(type='AT', layer='backbone.layer3', teacher_layer='backbone.layer4', loss_weight=1000.0)
    model = mmkd.distill(student(), dict(own=dict(type='Own')), dict(at=entry)).train()
    data = model.data_preprocessor(random_batch(model, (2, 3, 96, 128)), True)
    loss = model(**data, mode='loss')['at.loss']
    assert loss > 0
    loss.backward()
    assert model.backbone.layer3[-1].conv2.weight.grad.abs().sum() > 0
    assert model.backbone.layer4[-1].conv2.weight.grad is None  # it is learnt from
    assert not [name for name in model.state_dict() if name.startswith(('sources', 'distillers'))]
    assert isinstance(model.sources['own'], Own)


def test_a_layer_is_not_compared_with_itself():
    with pytest.raises(ConfigError, match="distillers.at: layer 'neck' would be compared with itself"):
        mmkd.distill(student(), dict(own=dict(type='Own')), dict(at=dict(type='AT', layer='neck')))


# --- a peer


def mutual(tmp_path=None):
    config = segmentors.pspnet(24)
    return mmkd.distill(
        models.build(segmentors.pspnet(), seed=0),
        dict(peer=dict(type='Peer', config=config), own=dict(type='Own')),
        dict(down=dict(type='KD', teacher='peer'), up=dict(type='KD', learner='peer', teacher='own', loss_weight=0.5)),
    )


def test_a_peer_does_not_learn_what_is_not_labelled_as_background():
    model = mutual()
    data = model.data_preprocessor(random_batch(model, (2, 3, 64, 96)), True)
    data['data_samples'][0].set_metainfo(dict(labelled_for=['road']))
    with pytest.raises(ConfigError, match='peer: a batch has images .* with labels for some classes alone'):
        model.train()(**data, mode='loss')


def test_a_peer_is_trained_along():
    """Its own losses are logged; who learns gets the gradient, who is learnt from does not."""
    model = mutual()
    model.init_weights()
    model.train()
    data = model.data_preprocessor(random_batch(model, (2, 3, 64, 64)), True)
    found = model(**data, mode='loss')
    own = {name.removeprefix('peer.') for name in found if name.startswith('peer.')}
    assert own == {name for name in found if name.startswith(('decode.', 'aux.'))}
    peer = model.sources['peer'].model
    weights = (model.decode_head.conv_seg.weight, peer.decode_head.conv_seg.weight)
    for name, learns in (('down', 0), ('up', 1)):
        gradients = torch.autograd.grad(found[f'{name}.loss'], weights, allow_unused=True, retain_graph=True)
        assert gradients[learns].abs().sum() > 0
        assert gradients[1 - learns] is None
    # the peer's own loss is that of the same model alone
    alone = models.build(segmentors.pspnet(24))
    alone.load_state_dict(peer.state_dict())
    torch.manual_seed(3)
    expected = alone.train()(**data, mode='loss')
    torch.manual_seed(3)
    found = peer.train()(**data, mode='loss')
    torch.testing.assert_close(found['decode.loss_ce'], expected['decode.loss_ce'])
    total, _ = model.parse_losses(model(**data, mode='loss'))
    total.backward()
    assert all(each.grad is not None for each in model.parameters())
    assert any(name.startswith('sources.peer.model.') for name in model.state_dict())
    assert {id(each) for each in peer.parameters()} <= {id(each) for each in model.parameters()}


# --- a built student, a built teacher, built distillers


def test_a_built_student_keeps_its_weights(teacher_options):
    plain = models.build(detectors.retinanet())
    for each in plain.parameters():
        nn.init.constant_(each, 0.123)
    model = mmkd.distill(plain, teacher_options, dict(gid=dict(type='GID')))
    model.init_weights()
    assert model.sources['teacher'].loaded
    own = [each for name, each in model.named_parameters() if not name.startswith('distillers')]
    assert all((each == 0.123).all() for each in own)


def test_a_built_teacher_keeps_its_weights_and_is_not_changed():
    teacher = models.build(detectors.retinanet(channels=24), seed=1)
    before = copy.deepcopy(teacher.state_dict())
    model = mmkd.distill(student(), teacher, dict(cwd=CWD(layer='neck')))
    model.init_weights()
    assert losses(model)['cwd.loss'] > 0
    assert teacher.training
    assert all(
        each.requires_grad == (not name.startswith('backbone.bn')) or each.requires_grad
        for name, each in teacher.named_parameters()
    )
    assert teacher.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_a_cell_that_is_run_twice_and_the_way_back(teacher_options):
    plain = student()
    keys, kind = list(plain.state_dict()), type(plain)
    for _ in range(2):
        model = mmkd.distill(plain, teacher_options, dict(cwd=CWD_NECK))
    assert type(model).__name__ == 'DistilledRetinaNet'
    assert model.plain() is plain
    assert type(plain) is kind
    assert list(plain.state_dict()) == keys


def test_a_student_is_pickled(teacher_options, tmp_path):
    model = mmkd.distill(student(), teacher_options, dict(cwd=CWD_NECK, at=dict(type='AT', layer='neck')))
    model.init_weights()
    torch.save(model, tmp_path / 'model.pth')
    again = torch.load(tmp_path / 'model.pth', weights_only=False)
    assert type(again) is type(model)
    for name, value in losses(model).items():
        if name.endswith('.loss'):
            torch.testing.assert_close(losses(again)[name], value)


def test_a_student_by_its_configs_name(teacher_options):
    model = mmkd.distill('mmkd::shapes/retinanet_student.py', teacher_options, dict(cwd=CWD_NECK))
    assert type(model).__name__ == 'DistilledRetinaNet'


def test_a_teacher_without_a_data_preprocessor_takes_the_students(teacher_options):
    config = {key: value for key, value in teacher_options['config'].items() if key != 'data_preprocessor'}
    with_its_own = mmkd.distill(student(), teacher_options, dict(at=dict(type='AT', layer='neck')))
    without = mmkd.distill(student(), dict(teacher_options, config=config), dict(at=dict(type='AT', layer='neck')))
    for model in (with_its_own, without):
        model.init_weights()
    torch.testing.assert_close(losses(without)['at.loss'], losses(with_its_own)['at.loss'])


def test_kinds_of_sources_are_classes_of_their_own(teacher_options):
    model = mmkd.distill(
        student(),
        dict(frozen=teacher_options, mean=dict(type='mmkd.sources.Average')),
        dict(one=dict(CWD_NECK, teacher='frozen'), two=dict(type='AT', layer='neck', teacher='mean')),
    )
    assert [type(each) for each in model.sources.values()] == [Teacher, Average]


def test_a_peer_starts_from_its_checkpoint_and_sees_its_own_normalization(tmp_path):
    other = other_teacher(tmp_path)
    model = mmkd.distill(student(), dict(peer=dict(type='Peer', **other)), dict(at=dict(type='AT', layer='neck')))
    model.init_weights()
    peer = model.sources['peer'].model
    weights = torch.load(other['checkpoint'], weights_only=True)['state_dict']
    assert all(torch.equal(value, weights[name]) for name, value in peer.state_dict().items())
    seen = []
    peer.backbone.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    raw = random_batch(model, (2, 3, 96, 128))
    expected = peer.data_preprocessor(copy.deepcopy(raw), True)['inputs']
    losses(model)
    torch.testing.assert_close(seen[0], expected, rtol=1e-5, atol=1e-3)


def test_a_peer_whose_checkpoint_does_not_fit(tmp_path, teacher_options):
    peer = dict(type='Peer', config=other_teacher(tmp_path)['config'], checkpoint=teacher_options['checkpoint'])
    model = mmkd.distill(student(), dict(peer=peer), dict(at=dict(type='AT', layer='neck')))
    with pytest.raises(ConfigError, match=r'peer.*checkpoint .* does not fit GFL'):
        model.init_weights()
