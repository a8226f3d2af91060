"""A device that skips tasks: its tasks keep the scenario's numbers, and nothing else is different."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from lightcl.data.partition import Share
from lightcl.device.device import EdgeDevice, OutOfStep, Position
from tests.lightcl import toys

SIX = toys.source(classes=6, size=16)
"""Three tasks of two classes."""
THREE_TASKS = {"stream": {"tasks": 3}, "training": {"epochs": 1}}


def share_of_classes(*classes: int) -> Share:
    return Share(np.flatnonzero(np.isin(SIX.train.labels, classes)), np.flatnonzero(np.isin(SIX.test.labels, classes)))


def device_with(folder: Path, *classes: int, **sections: object) -> EdgeDevice:
    scenario = toys.scenario(**THREE_TASKS | sections)
    return EdgeDevice(scenario, 0, folder, source=SIX, share=share_of_classes(*classes))


def test_the_device_goes_from_task_0_to_task_2(tmp_path: Path) -> None:
    device = device_with(tmp_path, 0, 1, 4, 5)
    assert device.stream.ids == (0, 2)
    device.train(0, 1)
    first = device.evaluate()
    with pytest.raises(OutOfStep, match=r"device 0 learns 2 of 3 tasks \(0, 2\)"):
        device.train(1, 1)
    device.train(2, 1)
    device.check_at(2, 1)
    second = device.evaluate()
    assert device.finished
    assert (first.tasks, second.tasks, second.task) == ([0], [0, 2], 2)
    assert (len(second.til), second.images) == (2, [10, 10])
    nan = math.nan
    expected = [[first.til[0], nan, nan], [nan, nan, nan], [second.til[0], nan, second.til[1]]]
    np.testing.assert_array_equal(device.matrix("til").values, expected)
    assert device.matrix("til").forgetting() == pytest.approx(first.til[0] - second.til[0])


def test_the_first_task_may_be_skipped(tmp_path: Path) -> None:
    device = device_with(tmp_path, 2, 3, 4, 5)
    assert device.position == Position(1, 0)
    with pytest.raises(OutOfStep, match="learns 2 of 3 tasks"):
        device.train(0, 1)
    with pytest.raises(OutOfStep, match="cannot go to task 2"):
        device.train(2, 1)
    device.train(1, 1)
    again = device_with(tmp_path, 2, 3, 4, 5)  # killed and opened again
    assert again.position == Position(1, 1)
    assert not again.finished
    again.train(2, 1)
    assert again.finished
    assert again.evaluate().tasks == [1, 2]


def test_a_skipped_last_task_does_not_change_what_was_learned_before(tmp_path: Path) -> None:
    """Seeds follow the number of the task, not what else the device learns."""
    some, every = device_with(tmp_path / "some", 0, 1, 2, 3), device_with(tmp_path / "all", *range(6))
    for task in (0, 1):
        reports = [device.train(task, 1) for device in (some, every)]
        assert reports[0].loss == reports[1].loss
        assert some.evaluate().til == every.evaluate().til
    assert some.finished
    assert not every.finished


def test_a_device_without_tasks_is_finished(tmp_path: Path) -> None:
    device = device_with(tmp_path)
    assert device.finished
    assert device.matrix("til").last == -1
    with pytest.raises(OutOfStep, match=r"learns 0 of 3 tasks \(none\)"):
        device.train(0, 1)
    with pytest.raises(OutOfStep, match="learns no task"):
        device.evaluate()


def test_joint_training_learns_all_present_tasks_under_the_number_of_the_last(tmp_path: Path) -> None:
    device = device_with(tmp_path, 0, 1, 2, 3, method={"name": "joint"})
    assert device.position == Position(1, 0)
    assert device.train(1, 1).examples == 72  # 4 classes of 20 images, a tenth held out
    assert device.finished
    assert device.evaluate().tasks == [0, 1]
