import pytest
import torch

from mmkd.distillers.levels import match_levels
from mmkd.errors import ConfigError


def levels(*sizes):
    return [torch.zeros(1, 1, size, size) for size in sizes]


@pytest.mark.parametrize(
    ('student', 'teacher', 'pairs'),
    [
        ((32, 16, 8, 4, 2), (32, 16, 8, 4, 2), [(0, 0), (1, 1), (2, 2), (3, 3), (4, 4)]),
        ((32, 16, 8, 4, 2), (64, 32, 16, 8, 4), [(0, 1), (1, 2), (2, 3), (3, 4)]),
        ((16,), (32, 16, 8), [(0, 1)]),
        ((8, 8, 4), (8, 8, 8), [(0, 0), (1, 1)]),
        ((16,), (32,), [(0, 0)]),  # two single levels belong together: the adapter resizes
    ],
)
def test_levels_of_one_stride_belong_together(student, teacher, pairs):
    assert match_levels(levels(*student), levels(*teacher), 'stride', ('a', 'b')) == pairs


def test_levels_by_index():
    found = match_levels(levels(32, 16), levels(64, 32), 'index', ('a', 'b'))
    assert found == [(0, 0), (1, 1)]


@pytest.mark.parametrize(
    ('match', 'student', 'teacher', 'message'),
    [('stride', (32, 16), (8, 4), 'no level of the same stride'), ('index', (32, 16), (32,), 'have 2 and 1 levels')],
)
def test_levels_that_do_not_belong_together_are_errors(match, student, teacher, message):
    with pytest.raises(ConfigError, match=message):
        match_levels(levels(*student), levels(*teacher), match, ('a', 'b'))
