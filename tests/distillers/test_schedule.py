import inspect
import math

import pytest
from mmengine.logging import MessageHub

from mmkd.distillers.collection import Distillers
from mmkd.distillers.schedule import Weight
from mmkd.errors import ConfigError
from mmkd.hosts.running import probe
from mmkd.registry import DISTILLERS
from mmkd.sources import Source
from mmkd.testing import detectors, models


@pytest.mark.parametrize(
    ('spec', 'expected'),
    [
        (3.0, {0: 3.0, 10**6: 3.0}),
        (dict(type='constant', value=2.0, begin=10, end=20), {9: 0.0, 10: 2.0, 19: 2.0, 20: 0.0}),
        (dict(type='linear', value=10.0, end=1), {0: 0.0, 1: 10.0}),
        (dict(type='linear', value=10.0, end=500), {0: 0.0, 250: 5.0, 500: 10.0, 900: 10.0}),
        (dict(type='linear', value=0.0, start=8.0, begin=100, end=200), {50: 8.0, 150: 4.0, 300: 0.0}),
        (dict(type='cosine', value=4.0, end=100), {0: 0.0, 25: 4 * (1 - math.cos(math.pi / 4)) / 2, 50: 2.0, 100: 4.0}),
        (dict(type='step', value=8.0, milestones=[10, 20], gamma=0.5), {9: 8.0, 10: 4.0, 20: 2.0}),
    ],
)
def test_weight_at_an_iteration(spec, expected):
    weight = Weight(spec)
    assert {iteration: pytest.approx(weight.at(iteration)) for iteration in expected} == expected
    assert weight() == weight.at(0)


def test_the_iteration_is_the_runners(teacher_options):
    """Of a Runner that runs, and not of one that ran before."""
    ramp = dict(type='linear', value=1.0, end=100)
    hub = MessageHub.get_instance('schedule test')
    hub.update_info('iter', 40)
    distillers = Distillers(dict(cwd=dict(type='CWD', layer='neck', loss_weight=ramp)))
    student, teacher = (probe(models.build(detectors.retinanet()), ['neck']) for _ in range(2))
    distillers.connect({'teacher': Source()})
    distillers.setup(student, {'teacher': teacher})
    for expected in (0, 1):
        assert distillers.start_step() == expected
    for iteration in (50, 51):
        hub.update_info('iter', iteration)
        assert distillers.start_step() == iteration
        assert distillers['cwd'].loss_weight() == pytest.approx(iteration / 100)


@pytest.mark.parametrize(
    ('spec', 'message'),
    [
        (dict(type='linaer', value=1), "type 'linaer' is unknown"),
        (dict(type='linear', value=1), "linear needs \\['end'\\]"),
        (dict(type='linear', value=1, end=9, stop=3), "no option 'stop'"),
        (dict(type='cosine', value=1, begin=9, end=9), 'end has to come after begin'),
        (dict(type='linear', value=1, end=0), 'end has to come after begin'),
        (dict(type='step', value=1), r"step needs \['milestones'\]"),
        (dict(type='step', value=1, milestones=8000), r'weight=.*milestones has to be a list'),
        ('10', 'expected a finite number'),
        (float('nan'), 'expected a finite number'),
    ],
)
def test_what_is_no_weight_is_an_error(spec, message):
    with pytest.raises(ConfigError, match=message):
        Weight(spec)


WEIGHTS = [
    (method, option)
    for method, kind in DISTILLERS.module_dict.items()
    for option in inspect.signature(kind).parameters
    if option.endswith('_weight')
]


@pytest.mark.parametrize(('method', 'option'), WEIGHTS)
def test_a_weight_that_is_no_number_is_named_by_its_option(method, option):
    kind = DISTILLERS.get(method)
    given = inspect.signature(kind).parameters.get('layer')
    layer = dict(layer='neck') if given is not None and given.default is given.empty else {}
    with pytest.raises(ConfigError, match=f"^{option}='2'"):
        kind(**layer, **{option: '2'})


@pytest.mark.parametrize(
    'spec',
    [
        3.0,
        dict(type='constant', value=1, begin=2.5, end=7),
        dict(type='linear', value=1, end=8),
        dict(type='linear', value=1, begin=3, end=8),
        dict(type='linear', value=0, start=1, begin=2, end=8.5),
        dict(type='cosine', value=1, begin=2.5, end=6),
        dict(type='step', value=1, gamma=0, milestones=[4.5, 7]),
    ],
)
def test_between_its_turns_a_weight_is_0_everywhere_or_nowhere(spec):
    weight = Weight(spec)
    turns = weight.turns()
    for iteration in range(1, 12):
        assert iteration in turns or bool(weight.at(iteration)) == bool(weight.at(iteration - 1))
