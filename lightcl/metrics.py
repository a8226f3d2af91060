"""Average accuracy, forgetting and backward transfer from an accuracy matrix, and their spread over a fleet.

A device need not learn every task of the scenario: it skips the tasks for which it has too few images. The matrix has
the scenario's tasks as rows and columns; the row and the column of a skipped task are holes (NaN), and every figure is
defined over the tasks that the device has learned. With L tasks learned, the figures are those of the L x L matrix
without the holes.

There is no forward transfer: the head's rows for a task are untrained until it is learned, so the accuracy on it before
is chance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

NAN = float("nan")

FEW_TEST_IMAGES = 50
"""With fewer test images than this, the accuracy of a device is coarse: one image is more than two points."""


class AccuracyMatrix:
    """`A[t, k]`: accuracy in 0..1 on task k after learning task t, both 0-based; NaN where it was not tested."""

    def __init__(self, tasks: int) -> None:
        self.values = np.full((tasks, tasks), np.nan)

    @classmethod
    def from_rows(
        cls, rows: Mapping[int, Sequence[float]], tasks: int, ids: Sequence[int] | None = None
    ) -> AccuracyMatrix:
        """`rows[t][i]` is the accuracy on task `ids[i]` after task t; all numbers are the scenario's.

        `ids` are the tasks that the device learns, ascending; by default all. A row ends with its own task or earlier.
        """
        columns = np.arange(tasks) if ids is None else np.asarray(ids, dtype=np.int64)
        matrix = cls(tasks)
        for task, row in rows.items():
            matrix.values[task, columns[: len(row)]] = row
        return matrix

    @property
    def last(self) -> int:
        """The last task after which there was a test; -1 where there was none."""
        tested = np.flatnonzero(~np.isnan(self.values).all(axis=1))
        return int(tested[-1]) if len(tested) else -1

    @property
    def learned(self) -> np.ndarray:
        """The tasks that were tested, ascending: those of the last test, and those whose test images are gone since."""
        return np.flatnonzero(~np.isnan(self.values).all(axis=0))

    def average_accuracy(self, after: int | None = None) -> float:
        """Mean accuracy on the tasks learned so far, after task t (Lopez-Paz & Ranzato 2017, ACC).

        NaN where there was no test after task t, as for a task that the device skips.
        """
        t = self.last if after is None else after
        row = self.values[t, : t + 1] if t >= 0 else np.empty(0)
        row = row[~np.isnan(row)]
        return float(row.mean()) if len(row) else NAN

    def forgetting_per_task(self) -> np.ndarray:
        """`[t]`: each earlier task's best accuracy so far minus its accuracy now (Chaudhry et al. 2018).

        One value per task before the last learned one; NaN for tasks that were not learned.
        """
        t = self.last
        if t < 1:
            return np.empty(0)
        # Before task k was learned (rows above k) it was not tested. Under joint training nothing was tested before the
        # end, and nothing can be forgotten; in both cases the accuracy now stands for the best one so far.
        now = self.values[t, :t]
        before = np.fmax.reduce(self.values[:t, :t], axis=0)
        lost: np.ndarray = np.where(np.isnan(before), now, before) - now
        return lost

    def forgetting(self) -> float:
        """Mean of `forgetting_per_task` over the earlier tasks that were learned.

        NaN after a single task: there is nothing to forget.
        """
        return _mean(self.forgetting_per_task())

    def backward_transfer(self) -> float:
        """Mean of A[T, k] - A[k, k] over the earlier tasks k that were learned (Lopez-Paz & Ranzato 2017, BWT).

        NaN after a single task.
        """
        t = self.last
        if t < 1:
            return NAN
        now, first = self.values[t, :t], np.diagonal(self.values)[:t]
        return _mean(now - np.where(np.isnan(first), now, first))  # joint training: not tested before the end

    def summary(self) -> dict[str, float]:
        """The three figures by name; NaN where one is not defined."""
        return {
            "average_accuracy": self.average_accuracy(),
            "forgetting": self.forgetting(),
            "backward_transfer": self.backward_transfer(),
        }


def row_over(ids: Sequence[int], tested: Sequence[int], accuracies: Sequence[float]) -> list[float]:
    """A row of `AccuracyMatrix.from_rows`: accuracies of the tasks `tested`, which are some of `ids`, NaN for others.

    It ends with the last tested task. By hand: of tasks 0, 2 and 5 only 5 is tested, with 0.8: [NaN, NaN, 0.8].
    """
    values = dict(zip(tested, accuracies, strict=True))
    return [values.get(task, NAN) for task in ids if tested and task <= tested[-1]]


def _mean(values: np.ndarray) -> float:
    """Mean over the values that are not NaN; NaN if there are none."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else NAN


@dataclass(frozen=True)
class Spread:
    """One figure over the devices of a fleet."""

    mean: float
    std: float
    p10: float
    p90: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Spread over the devices that have the figure: NaN values do not count.

        `std` is that of the sample (n - 1), 0 for one device; all are NaN where no device has the figure.
        """
        array = np.asarray(values, dtype=float)
        array = array[~np.isnan(array)]
        if not len(array):
            return cls(NAN, NAN, NAN, NAN)
        p10, p90 = np.percentile(array, [10, 90])
        return cls(float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else 0.0, float(p10), float(p90))


def fleet_summary(matrices: Sequence[AccuracyMatrix]) -> dict[str, Spread]:
    """Average accuracy, forgetting and backward transfer of every device, as their spread over the fleet.

    Devices without a test are ignored; a device that learned one task counts only for average accuracy.
    """
    rows = [matrix.summary() for matrix in matrices if matrix.last >= 0]
    return {key: Spread.of([row[key] for row in rows]) for key in AccuracyMatrix(1).summary()}
