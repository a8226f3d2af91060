"""What a scenario is prepared into: the tasks of every device, and what partition.json says of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lightcl import preparation
from lightcl.analysis.generalizability import first_analyzable
from lightcl.assembly import build_stream, count_fleet
from lightcl.data.partition import Share, partition
from lightcl.data.sources import ImageSet, Source
from lightcl.errors import RequestError
from lightcl.preparation import open_run, prepare
from lightcl.records import load_run
from lightcl.records.folder import RunFolder
from lightcl.scenario import Scenario
from tests.lightcl import toys

SIX = toys.source(classes=6, train=20, test=5)
"""Three tasks of two classes."""


def test_images_per_device_and_task_by_hand() -> None:
    """Device 0 has 30 images of class 0 and 1, and one of class 4; device 1 has classes 2 and 5."""
    of = [np.flatnonzero(SIX.train.labels == c) for c in range(6)]
    shares = [
        Share(np.concatenate([of[0], of[1][:10], of[4][:1]]), np.arange(30)),
        Share(np.concatenate([of[2], of[5]]), np.flatnonzero(SIX.test.labels != 5)),
    ]
    counts = count_fleet(toys.scenario(stream={"tasks": 3}, fleet={"devices": 2}), SIX, shares)
    assert counts.train.tolist() == [[27, 0, 1], [0, 18, 18]]  # a tenth is held out
    assert counts.held_out.tolist() == [[3, 0, 0], [0, 2, 2]]
    assert counts.test.tolist() == [[10, 0, 5], [0, 5, 0]]  # only of classes that it trains on
    assert counts.tasks == [(0,), (1,)]
    assert counts.train_used.tolist() == [27, 18]
    assert counts.tested_used.tolist() == [10, 5]
    skipped = [[(s.task, s.reason, s.train, s.test) for s in counts.skipped(device)] for device in range(2)]
    few = "fewer than 2 training images"
    assert skipped == [[(1, few, 0, 0), (2, few, 1, 5)], [(0, few, 0, 0), (2, "no test image", 18, 0)]]


def test_reasons_of_other_streams() -> None:
    three = Share(np.flatnonzero(SIX.train.labels < 3), np.arange(30))
    own = toys.scenario(stream={"tasks": 3, "cut": "own"})
    assert count_fleet(own, SIX, [three]).tasks == [(0,)]
    assert {s.reason for s in count_fleet(own, SIX, [three]).skipped(0)} == {"fewer than 2 classes left"}
    few = Share(
        np.concatenate([np.flatnonzero(SIX.train.labels == c)[:n] for c, n in ((0, 20), (2, 4))]), np.arange(30)
    )
    unseen = toys.scenario(stream={"tasks": 3, "evaluate_on": "held-out"})
    assert count_fleet(unseen, SIX, [few]).skipped(0)[0].reason == "no held-out image"
    assert count_fleet(unseen, SIX, [few]).tested_used.tolist() == [2]  # a tenth of 20


@pytest.mark.parametrize("stream", [{}, {"cut": "own"}, {"class_order": "shuffled", "per_device_order": True}])
def test_counts_are_those_of_the_streams_that_the_devices_learn(stream: dict[str, object]) -> None:
    scenario = toys.scenario(
        stream={"tasks": 3} | stream, fleet={"devices": 12, "partition": "dirichlet", "alpha": 0.1}
    )
    shares = partition(SIX, scenario.fleet, 0)
    counts = count_fleet(scenario, SIX, shares)
    assert any(counts.skipped(device) for device in range(12))
    for device, share in enumerate(shares):
        cut = build_stream(scenario, SIX, share, device)
        assert counts.tasks[device] == cut.ids
        assert counts.skipped(device) == list(cut.skipped)
        assert counts.train_used[device] == sum(len(task.train) for task in cut)
        assert counts.tested_used[device] == sum(len(task.test) for task in cut)


UNEVEN = {
    "stream": {"tasks": 3},
    "fleet": {"devices": 12, "partition": "dirichlet", "alpha": 0.1, "test_data": "matched"},
}


@pytest.fixture
def uneven(monkeypatch: pytest.MonkeyPatch) -> Scenario:
    """Twelve devices; the images do not come from a file."""
    monkeypatch.setattr(preparation, "load_source", lambda request: SIX)
    return toys.scenario(**UNEVEN)


def test_partition_json_names_what_is_skipped(uneven: Scenario, tmp_path: Path) -> None:
    prepared = open_run(RunFolder(tmp_path), uneven, "test", "fleet", resume=False, overwrite=False)
    run = load_run(tmp_path)
    for device, tasks in enumerate(prepared.tasks):
        assert run.tasks_of(device) == tasks
        row = run.partition[device]
        assert row["train"] == prepared.shares[device].train.tolist()
        assert row["test"] == "test images in the proportions of its training images, drawn by the seed"
        assert [s["task"] for s in run.skipped_of(device)] == sorted({0, 1, 2} - set(tasks))
        assert ("tasks" in row) == ("skipped" in row) == (len(tasks) < 3)
    assert any(run.skipped_of(device) for device in range(12))


def test_a_device_without_tasks_is_not_trained_alone(uneven: Scenario, tmp_path: Path) -> None:
    prepared = prepare(uneven.model_copy(update={"stream": uneven.stream.model_copy(update={"min_samples": 12})}))
    idle = next(device for device, tasks in enumerate(prepared.tasks) if not tasks)
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(
        RequestError, match=rf"device {idle} learns no task: .* \(the first that learns a task is \d+\)"
    ):
        open_run(folder, prepared.scenario, "test", f"device {idle}", resume=False, overwrite=False)
    assert not (tmp_path / "run").exists()


def test_only_a_fleet_in_which_no_device_learns_is_refused(uneven: Scenario) -> None:
    with pytest.raises(RequestError, match="no device can learn a task"):
        prepare(uneven.model_copy(update={"stream": uneven.stream.model_copy(update={"min_samples": 100})}))


def test_partition_json_without_skipped_tasks_is_as_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(preparation, "load_source", lambda request: SIX)
    open_run(RunFolder(tmp_path), toys.scenario(fleet={"devices": 2}), "t", "fleet", resume=False, overwrite=False)
    for row in json.loads((tmp_path / "partition.json").read_text()):
        assert list(row) == ["device", "train", "test"]


def test_the_freeze_point_is_chosen_on_the_first_device_that_learns_two_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert first_analyzable([(), (2,), (0, 2), (0, 1, 2)]) == 2
    with pytest.raises(RequestError, match="no device learns two tasks"):
        first_analyzable([(), (1,)])
    # As a whole: every image of device 0 is of one task.
    labels = np.array([0, 0, 0, 0, 1, 1, 1, 1] + [0, 1, 2, 3] * 4)
    groups = np.array([0] * 8 + [1] * 16)
    pictures = toys.image_set(labels.tolist(), 4, size=16)
    train = ImageSet(pictures.images, pictures.labels, pictures.classes, groups, ("ann", "bob"))
    monkeypatch.setattr(
        preparation, "load_source", lambda request: Source(train, toys.image_set([0, 1, 2, 3], 4, size=16))
    )
    scenario = toys.scenario(
        data={"source": "parquet", "path": "nowhere"},
        fleet={"devices": 2, "partition": "natural", "partition_by": "user", "test_data": "whole"},
        network={"freeze": "auto", "analysis_epochs": 1},
        training={"epochs": 1},
    )
    chosen = preparation.choose_freeze_point(prepare(scenario)).analysis
    assert chosen is not None
    assert (chosen["device"], chosen["tasks"]) == (1, [1])
