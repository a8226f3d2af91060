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


@pytest.mark.parametrize("tasks", [2, 5, 9])
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


def nan_is(value: float) -> bool:
    return math.isnan(value)


def test_one_task_has_nothing_to_forget():
    matrix = AccuracyMatrix.from_rows({0: [0.4]}, 3)
    assert matrix.average_accuracy() == 0.4
    assert nan_is(matrix.forgetting())
    assert nan_is(matrix.backward_transfer())


def test_without_a_test_figures_are_nan():
    matrix = AccuracyMatrix(3)
    assert (matrix.last, len(matrix.learned)) == (-1, 0)
    assert all(nan_is(value) for value in matrix.summary().values())


# -- devices that skip tasks ---------------------------------------------------------------------------------------


def test_skipped_tasks_are_holes():
    """Of five tasks the device learns 1, 3 and 4."""
    matrix = AccuracyMatrix.from_rows({1: [0.9], 3: [0.6, 0.8], 4: [0.7, 0.5, 0.6]}, 5, ids=(1, 3, 4))
    nan = np.nan
    expected = [
        [nan, nan, nan, nan, nan],
        [nan, 0.9, nan, nan, nan],
        [nan, nan, nan, nan, nan],
        [nan, 0.6, nan, 0.8, nan],
        [nan, 0.7, nan, 0.5, 0.6],
    ]
    np.testing.assert_array_equal(matrix.values, expected)
    assert (matrix.last, matrix.learned.tolist()) == (4, [1, 3, 4])


def test_figures_are_defined_over_the_tasks_that_were_learned():
    """The numbers of `test_three_tasks_by_hand`, with tasks 0 and 2 of five skipped."""
    matrix = AccuracyMatrix.from_rows({1: [0.9], 3: [0.6, 0.8], 4: [0.7, 0.5, 0.6]}, 5, ids=(1, 3, 4))
    assert matrix.average_accuracy() == pytest.approx(0.6)  # (0.7 + 0.5 + 0.6) / 3
    assert matrix.average_accuracy(after=3) == pytest.approx(0.7)  # (0.6 + 0.8) / 2
    assert nan_is(matrix.average_accuracy(after=2))  # it was skipped
    # task 1: max(0.9, 0.6) - 0.7 = 0.2; task 3: 0.8 - 0.5 = 0.3
    assert matrix.forgetting_per_task() == pytest.approx([np.nan, 0.2, np.nan, 0.3], nan_ok=True)
    assert matrix.forgetting() == pytest.approx(0.25)
    assert matrix.backward_transfer() == pytest.approx(-0.25)  # (0.7 - 0.9 + 0.5 - 0.8) / 2


def test_the_last_tasks_may_be_skipped():
    matrix = AccuracyMatrix.from_rows({0: [0.5], 2: [0.8, 0.9]}, 5, ids=(0, 2))
    assert (matrix.last, matrix.learned.tolist()) == (2, [0, 2])
    assert matrix.average_accuracy() == pytest.approx(0.85)
    assert matrix.forgetting() == pytest.approx(-0.3)  # a gain
    assert matrix.backward_transfer() == pytest.approx(0.3)


def test_a_device_that_learned_one_late_task_has_no_forgetting():
    matrix = AccuracyMatrix.from_rows({3: [0.7]}, 5, ids=(3,))
    assert matrix.average_accuracy() == 0.7
    assert nan_is(matrix.forgetting())
    assert nan_is(matrix.backward_transfer())


def test_joint_training_has_no_forgetting_with_holes_either():
    """Learned as one, tested once after the last of them."""
    matrix = AccuracyMatrix.from_rows({3: [0.7, 0.5]}, 5, ids=(1, 3))
    assert matrix.summary() == pytest.approx({"average_accuracy": 0.6, "forgetting": 0.0, "backward_transfer": 0.0})


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("seed", range(20))
def test_holes_change_only_the_numbering(seed):
    """The figures are those of the matrix without the holes, by their definitions."""
    generator = np.random.default_rng(seed)
    tasks = int(generator.integers(2, 10))
    ids = np.sort(generator.permutation(tasks)[: generator.integers(2, tasks + 1)])
    rows = [generator.random(t + 1).tolist() for t in range(len(ids))]
    matrix = AccuracyMatrix.from_rows(dict(zip(ids.tolist(), rows, strict=True)), tasks, ids.tolist())
    assert matrix.average_accuracy() == pytest.approx(reference.average_accuracy(rows))
    assert matrix.forgetting() == pytest.approx(reference.forgetting(rows))
    assert matrix.backward_transfer() == pytest.approx(reference.backward_transfer(rows))


# -- the fleet -----------------------------------------------------------------------------------------------------


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


def test_devices_without_a_figure_do_not_count_for_it():
    fleet = [
        AccuracyMatrix.from_rows({0: [0.9], 1: [0.5, 0.7]}, 3),  # accuracy 0.6, forgetting 0.4
        AccuracyMatrix.from_rows({2: [0.8]}, 3, ids=(2,)),  # accuracy 0.8, nothing to forget
    ]
    summary = fleet_summary(fleet)
    assert summary["average_accuracy"].mean == pytest.approx(0.7)
    assert (summary["forgetting"].mean, summary["forgetting"].std) == pytest.approx((0.4, 0.0))
    assert summary["backward_transfer"] == Spread.of([-0.4, math.nan])
    assert math.isnan(fleet_summary(fleet[1:])["forgetting"].mean)
