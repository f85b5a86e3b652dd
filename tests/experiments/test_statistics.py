import pytest

from mmkd.experiments.statistics import compare, ratio_of_medians, summary


def test_gain_and_errors_are_those_of_a_hand_calculation():
    # differences 0.10 and 0.16; variances 0.0008 and 0.005; s_d = 0.06 / sqrt(2)
    found = compare({0: 0.10, 1: 0.14}, {0: 0.20, 1: 0.30}, 0.38)
    assert found['gain'] == pytest.approx(0.13)
    assert found['gap_closed'] == pytest.approx(0.13 / 0.26)
    assert found['unpaired']['error'] == pytest.approx((0.0008 / 2 + 0.005 / 2) ** 0.5)
    assert found['unpaired']['ratio'] == pytest.approx(0.13 / 0.0029**0.5)
    assert found['paired']['error'] == pytest.approx(0.03)
    assert found['paired']['ratio'] == pytest.approx(13 / 3)
    assert found['unpaired']['significant']
    assert found['paired']['significant']


def test_two_standard_errors_are_what_counts():
    # seeds agree on the gain: the paired error is nearly 0, the unpaired one is 0.1
    found = compare({0: 0.1, 1: 0.3}, {0: 0.25, 1: 0.451}, None)
    assert found['unpaired']['ratio'] < 2
    assert found['unpaired']['significant'] is False
    assert found['paired']['significant'] is True
    assert compare({0: 0.2, 1: 0.201}, {0: 0.1, 1: 0.101}, None)['unpaired']['significant'] is False


def test_only_seeds_that_both_have_are_compared():
    found = compare({0: 0.1, 2: 0.5, 1: 0.14}, {1: 0.30, 3: 0.9, 0: 0.2}, 0.38)
    assert found == compare({0: 0.1, 1: 0.14}, {0: 0.2, 1: 0.3}, 0.38)


def test_what_cannot_be_known_is_none():
    one = compare({0: 0.1}, {0: 0.2}, 0.3)
    assert one['gain'] == pytest.approx(0.1)
    assert one['gap_closed'] == pytest.approx(0.5)
    assert one['unpaired'] == one['paired'] == {'error': None, 'ratio': None, 'significant': None}
    nothing = compare({0: 0.1}, {1: 0.2}, 0.3)
    assert (nothing['gain'], nothing['gap_closed']) == (None, None)
    assert nothing['unpaired'] == nothing['paired'] == one['paired']
    same = compare({0: 0.1, 1: 0.1}, {0: 0.2, 1: 0.2}, 0.05)
    assert same['gap_closed'] is None  # the teacher is worse
    assert same['unpaired'] == {'error': 0.0, 'ratio': None, 'significant': True}


def test_a_summary_has_mean_and_deviation_of_what_there_is():
    assert summary({3: 1.0, 5: 2.0}) == {
        'scores': {'3': 1.0, '5': 2.0},
        'mean': 1.5,
        'deviation': pytest.approx(0.5**0.5),
    }
    assert summary({3: 1.0})['deviation'] is None
    assert summary({}) == {'scores': {}, 'mean': None, 'deviation': None}


def test_a_ratio_of_medians_needs_values_of_both():
    assert ratio_of_medians([3.0, 1.0, 8.0], [2.0, 100.0, 1.0]) == 1.5
    assert ratio_of_medians([], [1.0]) is None
    assert ratio_of_medians([1.0], []) is None
