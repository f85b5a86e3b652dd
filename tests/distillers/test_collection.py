"""The mistakes that the author of a method makes, each one clear line."""

import pytest
import torch
from torch import nn

import mmkd
from mmkd.distillers import Distiller, FeatureDistiller, LevelPairs
from mmkd.errors import ConfigError
from mmkd.sources import Source
from mmkd.testing import detectors, models
from mmkd.testing.batches import random_batch

LAYER = 'bbox_head.retina_cls'


class Plain(nn.Module):
    """A method without options, which knows nothing of mmkd."""

    student_layers = teacher_layers = (LAYER,)

    def forward(self, student, teacher, data_samples):
        return {'loss': sum((s - t).abs().mean() for s, t in zip(student[LAYER], teacher[LAYER], strict=True))}


class Several(Plain):
    several_teachers = True

    def forward(self, student, teacher, data_samples):
        assert isinstance(teacher, dict)
        return super().forward(student, *teacher.values(), data_samples)


class SeveralOfNames(Several):
    teacher_layers = {'lagre': (LAYER,)}


class NoSuper(Plain):
    def __init__(self):
        self.tau = 1.0


class NoSuperAndModule(Distiller):
    student_layers = teacher_layers = ('neck',)

    def __init__(self):
        self.levels = LevelPairs('neck')


class Options(FeatureDistiller):
    def __init__(self, layer, **options):
        super().__init__(layer, **options)


class NoSetup(Distiller):
    student_layers = teacher_layers = ('neck',)

    def __init__(self):
        super().__init__()
        self.levels = LevelPairs('neck')

    def setup(self, student, teacher):
        pass

    def forward(self, student, teacher, data_samples):
        return {'loss': self.levels(student, teacher)[0].student.sum()}


class Returns(Plain):
    def __init__(self, what):
        super().__init__()
        self.what = what

    def forward(self, student, teacher, data_samples):
        loss = super().forward(student, teacher, data_samples)['loss']
        return dict(
            nothing=None,
            tensor=loss,
            no_loss={'distance': loss},
            detached={'loss': loss.detach()},
            misnamed={'feature_loss': loss},
            number={'loss': loss, 'levels': 3},
        )[self.what]


class Shrunk(nn.Module):
    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels + 1, 1)

    def forward(self, feature):
        return self.conv(feature)


class NoModel(Source):
    pass


class NoInit(Source):
    def __init__(self):
        self.model = None


def build(teacher, entry):
    model = mmkd.distill(models.build(detectors.retinanet(), seed=0), teacher, dict(it=entry))
    model.init_weights()
    data = model.data_preprocessor(random_batch(model, (1, 3, 64, 64)), True)
    return model(**data, mode='loss')


def own(name, **options):
    return dict(type=f'{__name__}.{name}', **options)


@pytest.mark.parametrize(
    ('entry', 'message'),
    [
        (own('Plain', loss_weight=2), "distillers.it: Plain has no option 'loss_weight'"),
        (own('Options', layer='neck', los_weight=2), "distillers.it: .*unexpected keyword argument 'los_weight'"),
        (own('NoSuper'), r'distillers.it: NoSuper.__init__ has to call super\(\).__init__\(\) first'),
        (own('NoSuperAndModule'), r'distillers.it: NoSuperAndModule.__init__ has to call super'),
        (own('NoSetup'), 'LevelPairs: its setup has to be called in the setup of the method'),
        (own('Returns', what='nothing'), 'distillers.it: Returns returned a NoneType; expected a dict of losses'),
        (own('Returns', what='tensor'), 'distillers.it: Returns returned a Tensor; expected a dict of losses'),
        (own('Returns', what='no_loss'), r"returned \['distance'\], of which none is a loss with a gradient"),
        (own('Returns', what='detached'), 'of which none is a loss with a gradient: nothing would be learnt'),
        (own('Returns', what='misnamed'), "key 'feature_loss' contains 'loss' but does not start with it"),
        (own('Returns', what='number'), "distillers.it: 'levels' is a int; expected a tensor"),
        (dict(type='L2', layer='neck'), "no distiller 'L2'; .*a class of your own is named by its dotted path"),
        (dict(type='CWD', layer='nekc'), "distillers.it: student layer 'nekc': RetinaNet has no such module"),
        (dict(type='CWD', layer='neck', teacher_layer='nekc'), "distillers.it: teacher layer 'nekc': RetinaNet"),
        (
            dict(type='CWD', layer='neck', adapter=own('Shrunk')),
            'distillers.it: adapter=.*: puts out 25 channels, the teacher has 24',
        ),
        (dict(type='CWD', layer='neck', adapter=own('Shrunk', out_channels=3)), 'out_channels is filled in, found'),
        (dict(type='CWD', layer='neck', teacher='other'), "teacher='other': there is none; there are teacher"),
    ],
)
def test_a_mistake_in_a_method_is_one_line(teacher_options, entry, message):
    with pytest.raises(ConfigError, match=message) as error:
        build(teacher_options, entry)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    ('source', 'message'),
    [
        (own('NoModel'), r'teacher: NoModel.__init__ has to set self.model'),
        (own('NoInit'), r'teacher: NoInit.__init__ has to call super\(\).__init__\(\)'),
        (own('Plain'), 'expected a config.s name, .*or a subclass of mmkd.sources.Source'),
    ],
)
def test_a_mistake_in_a_source_is_one_line(source, message):
    with pytest.raises(ConfigError, match=message) as error:
        build(source, own('Plain'))
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('name', ['myloss', 'a.b', 'keys', 'forward'])
def test_a_name_that_log_keys_or_attributes_cannot_have_is_an_error(teacher_options, name):
    spec = dict(type='CWD', layer='neck')
    with pytest.raises(
        ConfigError, match=f"^distillers.{name}: a name starts the log keys and must not contain 'loss'"
    ):
        mmkd.distill(models.build(detectors.retinanet()), teacher_options, {name: spec})


def test_a_method_of_several_teachers_gets_a_dict_of_one_as_well(teacher_options):
    one, other = (build(teacher_options, own(name))['it.loss'] for name in ('Several', 'Plain'))
    torch.testing.assert_close(one, other)
    both = dict(a=teacher_options, b=teacher_options)
    with pytest.raises(ConfigError, match=r"there are several teachers, a, b; name one, as in teacher=\['a', 'b'\]"):
        build(both, own('Several'))
    with pytest.raises(ConfigError, match='teacher_layers names lagre; its teachers are a, b'):
        build(both, own('SeveralOfNames', teacher=['a', 'b']))


# what an entry may have beside its method's options


def losses_with(factor, steps=1):
    distilled = mmkd.distill(
        models.build(detectors.retinanet()),
        models.build(detectors.retinanet()),
        dict(it=dict(type='GID', **({} if factor is None else dict(factor=factor)))),
    )
    distilled.init_weights()
    batch = distilled.data_preprocessor(random_batch(distilled, (2, 3, 96, 96)), True)
    return [distilled.train()(**batch, mode='loss') for _ in range(steps)]


def test_a_factor_multiplies_all_losses_of_an_entry_and_nothing_else():
    torch.manual_seed(0)
    (plain,) = losses_with(None)
    torch.manual_seed(0)
    (halved,) = losses_with(0.5)
    assert plain.keys() == halved.keys()
    for key, value in plain.items():
        for one, other in zip(*(each if isinstance(each, list) else [each] for each in (value, halved[key]))):
            expected = 0.5 * one if key.startswith('it.loss') else one
            torch.testing.assert_close(other, expected, rtol=1e-5, atol=0)


def test_a_factor_is_a_schedule_and_at_0_the_method_is_not_run():
    first, second, third = losses_with(dict(type='constant', value=2.0, begin=1, end=2), steps=3)
    assert 'it.loss_feature' in second
    assert 'it.loss_feature' not in first
    assert 'it.loss_feature' not in third


@pytest.mark.parametrize('factor', ['half', -1.0, dict(type='linear')])
def test_a_factor_that_is_none(factor):
    with pytest.raises(ConfigError, match=r'^distillers\.it\.factor='):
        losses_with(factor)
