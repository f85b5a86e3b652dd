"""Old names of options, and where each default is from: one table of each, for the methods of segmentors and the generic ones."""

import inspect

import pytest

from mmkd.errors import ConfigError
from mmkd.registry import DISTILLERS, build

# method: options of 0.1 and what they are called now
RENAMED = {
    'AT': {'weight': 'loss_weight'},
    'CWD': {'weight': 'loss_weight'},
    'MGD': {'weight': 'loss_weight'},
    'PKD': {'weight': 'loss_weight'},
    'KD': {'weight': 'loss_weight'},
    'IFVD': {'weight': 'loss_weight'},
    'DIST': {
        'weight': 'inter_weight and intra_weight',
        'loss_weight': 'inter_weight and intra_weight',
        'beta': 'inter_weight',
        'gamma': 'intra_weight',
    },
    'CIRKD': {
        'weight': 'batch_weight',
        'pixels': 'pixel_contrast_size',
        'regions': 'region_contrast_size',
        'pixel_memory': 'pixel_memory_size',
        'region_memory': 'region_memory_size',
    },
    'DAKD': {
        'auxiliary_weight': 'auxiliary_kl_weight = auxiliary_weight * kl_weight',
        'auxiliary_teacher_layer': 'teacher_auxiliary_layer',
    },
}


@pytest.mark.parametrize(
    ('method', 'old', 'new'), [(m, *names) for m, each in RENAMED.items() for names in each.items()]
)
def test_an_old_name_is_one_line_that_has_the_new_one(method, old, new):
    with pytest.raises(ConfigError) as error:
        build(DISTILLERS, 'distillers.it', {'type': method, 'layer': 'neck', old: 1})
    assert str(error.value) == f'distillers.it: {method} calls {old!r} {new!r} now'


@pytest.mark.parametrize('method', RENAMED)
def test_new_names_exist_and_old_ones_do_not(method):
    kind = DISTILLERS.get(method)
    options = inspect.signature(kind).parameters
    assert kind.renamed == RENAMED[method]
    for old, new in kind.renamed.items():
        assert old not in options
        assert all(each in options for each in new.partition(' = ')[0].split(' and '))
