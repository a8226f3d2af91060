"""Joint training: one task to learn, all of them to be tested on."""

import numpy as np
import pytest

from lightcl.assembly import build_stream
from lightcl.device.device import OutOfStep
from lightcl.metrics import AccuracyMatrix
from lightcl.scenario import Scenario
from tests.lightcl import toys

JOINT = {"name": "joint"}


def test_the_task_to_learn_holds_all_samples_and_is_the_last():
    held = toys.source()
    stream = build_stream(toys.scenario(method=JOINT), held, toys.whole(held), 0)
    task = stream.to_learn(stream.first)
    assert (len(stream), stream.first, task.id, task.classes) == (2, 1, 1, (0, 1, 2, 3))
    for part in ("train", "held_out", "test"):
        together = np.concatenate([getattr(t, part).indices for t in stream])
        assert getattr(task, part).indices.tolist() == sorted(together.tolist())


def test_a_sequential_stream_learns_task_by_task():
    held = toys.source()
    stream = build_stream(toys.scenario(), held, toys.whole(held), 0)
    assert stream.first == 0
    assert [stream.to_learn(t) for t in range(2)] == list(stream)


def test_a_device_learns_once_and_is_tested_on_every_task(tmp_path):
    settings = {"training": {"epochs": 12, "learning_rate": 0.05}, "data": {"augmentation": "none"}}
    device = toys.device(tmp_path, method=JOINT, **settings)
    report = device.train(1, 12)
    assert report.examples == sum(len(task.train) for task in device.stream)
    tested = device.evaluate()
    assert (tested.task, len(tested.til), len(tested.cil)) == (1, 2, 2)
    assert min(tested.cil) > 0.5  # every class was in the same training
    again = toys.device(tmp_path, method=JOINT, **settings)
    assert again.train(1, 12) == report


def test_there_is_no_task_before_the_last(tmp_path):
    with pytest.raises(OutOfStep, match="cannot go to task 0"):
        toys.device(tmp_path, method=JOINT).train(0, 1)


def test_nothing_is_forgotten_by_a_single_row():
    matrix = AccuracyMatrix.from_rows({2: [0.5, 0.75, 1.0]}, 3)
    assert matrix.summary() == {"average_accuracy": 0.75, "forgetting": 0.0, "backward_transfer": 0.0}


def test_a_fleets_stream_begins_where_the_devices_do():
    assert Scenario.model_validate({"method": JOINT}).first_task == 4
    assert Scenario().first_task == 0
