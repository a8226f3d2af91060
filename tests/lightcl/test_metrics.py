"""Figures of an accuracy matrix: by hand, and against their definitions."""

import math

import numpy as np
import pytest

from lightcl.metrics import AccuracyMatrix, Spread, fleet_summary
from tests.reference import accuracy as reference

HAND = {0: [0.9], 1: [0.6, 0.8], 2: [0.7, 0.5, 0.6]}


def test_three_tasks_by_hand():
    matrix = AccuracyMatrix.from_rows(HAND, 3)
    assert matrix.last == 2
    assert matrix.average_accuracy() == pytest.approx(0.6)  # (0.7 + 0.5 + 0.6) / 3
    assert matrix.average_accuracy(after=1) == pytest.approx(0.7)  # (0.6 + 0.8) / 2
    # task 0: max(0.9, 0.6) - 0.7 = 0.2; task 1: 0.8 - 0.5 = 0.3
    assert matrix.forgetting_per_task() == pytest.approx([0.2, 0.3])
    assert matrix.forgetting() == pytest.approx(0.25)
    # task 0: 0.7 - 0.9 = -0.2; task 1: 0.5 - 0.8 = -0.3
    assert matrix.backward_transfer() == pytest.approx(-0.25)


def test_forgetting_is_measured_from_the_best_and_transfer_from_the_first():
    # Task 0 got better before it got worse: forgetting 0.8 - 0.6 = 0.2, but transfer 0.6 - 0.5 = +0.1
    matrix = AccuracyMatrix.from_rows({0: [0.5], 1: [0.8, 0.9], 2: [0.6, 0.9, 0.7]}, 3)
    assert matrix.forgetting_per_task() == pytest.approx([0.2, 0.0])
    assert matrix.backward_transfer() == pytest.approx(0.05)  # (0.1 + 0) / 2


def test_a_gain_is_negative_forgetting():
    matrix = AccuracyMatrix.from_rows({0: [0.5], 1: [0.7, 0.9]}, 2)
    assert matrix.forgetting() == pytest.approx(-0.2)
    assert matrix.backward_transfer() == pytest.approx(0.2)


@pytest.mark.parametrize("tasks", [1, 2, 5, 9])
def test_figures_agree_with_their_definitions(tasks):
    generator = np.random.default_rng(tasks)
    rows = [generator.random(t + 1).tolist() for t in range(tasks)]
    matrix = AccuracyMatrix.from_rows(dict(enumerate(rows)), tasks)
    assert matrix.average_accuracy() == pytest.approx(reference.average_accuracy(rows))
    assert matrix.forgetting() == pytest.approx(reference.forgetting(rows))
    assert matrix.backward_transfer() == pytest.approx(reference.backward_transfer(rows))
    assert matrix.summary() == {
        "average_accuracy": matrix.average_accuracy(),
        "forgetting": matrix.forgetting(),
        "backward_transfer": matrix.backward_transfer(),
    }


def test_stream_that_has_not_ended_is_judged_by_what_was_tested():
    matrix = AccuracyMatrix.from_rows({0: [0.9], 1: [0.6, 0.8]}, 5)
    assert matrix.last == 1
    assert matrix.average_accuracy() == pytest.approx(0.7)
    assert matrix.forgetting() == pytest.approx(0.3)


def test_one_task_has_nothing_to_forget():
    matrix = AccuracyMatrix.from_rows({0: [0.4]}, 3)
    assert matrix.summary() == {"average_accuracy": 0.4, "forgetting": 0.0, "backward_transfer": 0.0}


def test_without_a_test_there_is_no_accuracy():
    matrix = AccuracyMatrix(3)
    assert matrix.last == -1
    assert math.isnan(matrix.average_accuracy())
    assert matrix.forgetting() == matrix.backward_transfer() == 0.0


def test_spread_by_hand():
    # mean 3; squares of deviations 4 + 1 + 0 + 1 + 4 = 10, / (5 - 1) = 2.5; percentiles interpolate: 1 + 0.1 * 4
    spread = Spread.of([1, 2, 3, 4, 5])
    assert (spread.mean, spread.std) == pytest.approx((3.0, math.sqrt(2.5)))
    assert (spread.p10, spread.p90) == pytest.approx((1.4, 4.6))


def test_spread_of_one_device_and_of_none():
    assert Spread.of([0.5]) == Spread(0.5, 0.0, 0.5, 0.5)
    nothing = Spread.of([])
    assert all(math.isnan(value) for value in (nothing.mean, nothing.std, nothing.p10, nothing.p90))


def test_fleet_summary_leaves_out_devices_that_were_never_tested():
    fleet = [
        AccuracyMatrix.from_rows({0: [0.9], 1: [0.5, 0.7]}, 2),  # accuracy 0.6, forgetting 0.4
        AccuracyMatrix.from_rows({0: [0.8], 1: [0.8, 0.8]}, 2),  # accuracy 0.8, forgetting 0
        AccuracyMatrix(2),
    ]
    summary = fleet_summary(fleet)
    assert summary["average_accuracy"].mean == pytest.approx(0.7)
    assert summary["average_accuracy"].std == pytest.approx(math.sqrt(0.02))  # 2 * 0.1² / (2 - 1)
    assert summary["forgetting"].mean == pytest.approx(0.2)
    assert summary["backward_transfer"].mean == pytest.approx(-0.2)
