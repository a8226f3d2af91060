"""Means and differences of a few runs: standard errors and 95 % intervals of Student's t."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isnan, nan, sqrt
from statistics import fmean, stdev, variance
from typing import TypeVar

K = TypeVar("K")

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Mean:
    """A mean over `count` observations; `deviation` and `error` are NaN for a single one."""

    mean: float
    deviation: float
    """Sample standard deviation (n - 1)."""
    error: float
    """Standard error of the mean: deviation / sqrt(n)."""
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean | None:
        """None without observations."""
        if not values:
            return None
        deviation = stdev(values) if len(values) > 1 else nan
        return cls(fmean(values), deviation, deviation / sqrt(len(values)), len(values))

    @property
    def margin(self) -> float:
        """Half of the 95 % interval of Student's t; NaN for a single observation."""
        return _quantile(self.count - 1) * self.error if self.count > 1 else nan


@dataclass(frozen=True)
class Difference:
    """Mean of A minus mean of B with its 95 % interval, which is NaN where there are too few observations."""

    mean: float
    error: float
    low: float
    high: float
    count: int
    """Number of pairs; for unpaired samples, the smaller number of observations."""
    paired: bool

    @property
    def clear(self) -> bool:
        """Whether the interval excludes zero."""
        return not isnan(self.low) and (self.low > 0 or self.high < 0)


def paired_difference(first: Mapping[K, float], second: Mapping[K, float]) -> Difference | None:
    """A minus B over the observations that both have; None where they have none in common."""
    differences = [first[key] - second[key] for key in first if key in second]
    if not differences:
        return None
    found = Mean.of(differences)
    assert found is not None
    margin = found.margin
    return Difference(found.mean, found.error, found.mean - margin, found.mean + margin, found.count, paired=True)


def unpaired_difference(first: Sequence[float], second: Sequence[float]) -> Difference | None:
    """A minus B of two independent samples, with the degrees of freedom of Welch (1947) and Satterthwaite (1946)."""
    if not first or not second:
        return None
    difference, count = fmean(first) - fmean(second), min(len(first), len(second))
    if count < 2:
        return Difference(difference, nan, nan, nan, count, paired=False)
    parts = [variance(values) / len(values) for values in (first, second)]
    error = sqrt(sum(parts))
    if error == 0:
        return Difference(difference, 0.0, difference, difference, count, paired=False)
    squares = sum(part**2 / (len(values) - 1) for part, values in zip(parts, (first, second), strict=True))
    margin = _quantile(sum(parts) ** 2 / squares) * error
    return Difference(difference, error, difference - margin, difference + margin, count, paired=False)


def _quantile(degrees: float) -> float:
    """The two-sided 95 % quantile of Student's t."""
    from scipy.stats import t

    return float(t.ppf(0.5 + CONFIDENCE / 2, degrees))
