"""Means, standard errors and intervals, against numbers worked out by hand and against SciPy's own tests."""

from __future__ import annotations

from math import isnan, sqrt

import pytest
from scipy import stats

from simulations.reports.statistics import Mean, paired_difference, unpaired_difference


def test_a_mean_and_its_standard_error():
    found = Mean.of([1.0, 2.0, 3.0, 6.0])
    # Deviations -2, -1, 0, 3: squares 14, over 3; the error is that over the root of 4.
    assert found is not None
    assert (found.mean, found.count) == (3.0, 4)
    assert found.deviation == pytest.approx(sqrt(14 / 3))
    assert found.error == pytest.approx(sqrt(14 / 3) / 2)
    single = Mean.of([0.5])
    assert single is not None
    assert single.mean == 0.5
    assert isnan(single.error)
    assert Mean.of([]) is None


def test_a_paired_difference_by_hand():
    # Differences 1, 2, 3 (the last of each has no partner): mean 2, error 1 / sqrt(3); t(0.975, 2) = 4.302653.
    found = paired_difference({0: 5.0, 1: 7.0, 2: 4.0, 3: 9.0}, {0: 4.0, 1: 5.0, 2: 1.0, 4: 9.0})
    assert found is not None
    assert (found.mean, found.count, found.paired) == (2.0, 3, True)
    assert found.error == pytest.approx(1 / sqrt(3))
    assert found.low == pytest.approx(2 - 4.302653 / sqrt(3), abs=1e-5)
    assert found.high == pytest.approx(2 + 4.302653 / sqrt(3), abs=1e-5)
    assert not found.clear


def test_one_pair_has_no_interval_and_none_no_difference():
    found = paired_difference({0: 5.0}, {0: 4.0})
    assert found is not None
    assert found.mean == 1.0
    assert isnan(found.low)
    assert not found.clear
    assert paired_difference({0: 5.0}, {1: 4.0}) is None


def test_equal_differences_have_an_interval_of_no_width():
    found = paired_difference({0: 2.0, 1: 4.0}, {0: 1.0, 1: 3.0})
    assert found is not None
    assert (found.low, found.high, found.clear) == (1.0, 1.0, True)


def test_an_unpaired_difference_by_hand():
    # Means 2 and 5; variances 1 / 3 and (20 / 3) / 4 = 5 / 3, together 2: the error is sqrt(2).
    first, second = [1.0, 2.0, 3.0], [2.0, 4.0, 6.0, 8.0]
    found = unpaired_difference(first, second)
    assert found is not None
    assert (found.mean, found.paired) == (-3.0, False)
    assert found.error == pytest.approx(sqrt(2))
    # Welch's degrees of freedom: 2^2 / ((1/3)^2 / 2 + (5/3)^2 / 3) = 4.0755, between t(4) = 2.7764 and t(5) = 2.5706.
    assert 2.5706 * sqrt(2) < found.high - found.mean < 2.7764 * sqrt(2)
    interval = stats.ttest_ind(first, second, equal_var=False).confidence_interval()
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert unpaired_difference([], [1.0]) is None
    same = unpaired_difference([1.0, 1.0], [3.0, 3.0])
    assert same is not None
    assert (same.low, same.high) == (-2.0, -2.0)
