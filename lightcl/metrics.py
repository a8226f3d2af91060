"""Accuracy matrix -> average accuracy, forgetting, backward transfer; and their spread over a fleet.

No forward transfer: the head's rows of a task are untrained until it is learned; accuracy on it before is chance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


class AccuracyMatrix:
    """`A[t, k]`: accuracy in 0..1 on task k after learning task t, both 0-based; NaN where it was not tested."""

    def __init__(self, tasks: int) -> None:
        self.values = np.full((tasks, tasks), np.nan)

    @classmethod
    def from_rows(cls, rows: Mapping[int, Sequence[float]], tasks: int) -> AccuracyMatrix:
        """`rows[t]` are the accuracies on tasks 0..t after task t."""
        matrix = cls(tasks)
        for task, row in rows.items():
            matrix.values[task, : len(row)] = row
        return matrix

    @property
    def last(self) -> int:
        """The last task after which there was a test; -1 where there was none."""
        tested = np.flatnonzero(~np.isnan(self.values).all(axis=1))
        return int(tested[-1]) if len(tested) else -1

    def average_accuracy(self, after: int | None = None) -> float:
        """Mean accuracy on tasks 0..t after task t (Lopez-Paz & Ranzato 2017, ACC)."""
        t = self.last if after is None else after
        return float(np.mean(self.values[t, : t + 1])) if t >= 0 else float("nan")

    def forgetting_per_task(self) -> np.ndarray:
        """`[t]`: each earlier task's best accuracy so far minus its accuracy now (Chaudhry et al. 2018)."""
        t = self.last
        if t < 1:
            return np.empty(0)
        # Before task k was learned (rows above k) it was not tested. Under joint training nothing was, and nothing
        # can be forgotten.
        before = np.fmax.reduce(self.values[:t, :t], axis=0)
        lost: np.ndarray = np.where(np.isnan(before), 0.0, before - self.values[t, :t])
        return lost

    def forgetting(self) -> float:
        """Mean of `forgetting_per_task`; 0 after a single task."""
        per_task = self.forgetting_per_task()
        return float(per_task.mean()) if len(per_task) else 0.0

    def backward_transfer(self) -> float:
        """Mean over earlier tasks of A[T, k] - A[k, k] (Lopez-Paz & Ranzato 2017, BWT); 0 after a single task."""
        t = self.last
        if t < 1:
            return 0.0
        gained = self.values[t, :t] - np.diagonal(self.values)[:t]
        return float(np.mean(np.where(np.isnan(gained), 0.0, gained)))

    def summary(self) -> dict[str, float]:
        return {
            "average_accuracy": self.average_accuracy(),
            "forgetting": self.forgetting(),
            "backward_transfer": self.backward_transfer(),
        }


@dataclass(frozen=True)
class Spread:
    """One figure over the devices of a fleet."""

    mean: float
    std: float
    p10: float
    p90: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """`std` is that of the sample (n - 1), 0 for one device; NaN throughout for none."""
        if not values:
            return cls(*[float("nan")] * 4)
        array = np.asarray(values, dtype=float)
        p10, p90 = np.percentile(array, [10, 90])
        return cls(float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else 0.0, float(p10), float(p90))


def fleet_summary(matrices: Sequence[AccuracyMatrix]) -> dict[str, Spread]:
    """Average accuracy, forgetting and backward transfer of every device, as their spread over the fleet."""
    rows = [matrix.summary() for matrix in matrices if matrix.last >= 0]
    return {key: Spread.of([row[key] for row in rows]) for key in AccuracyMatrix(1).summary()}
