"""The record of a fleet whose devices learn different tasks, on hand-worked numbers.

Of three tasks, device 0 learns all, device 1 learns 0 and 2, device 2 learns only task 1, and device 3 none.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from lightcl.records import DeviceRow, Results, RoundRow, load_run
from lightcl.records.folder import DEVICES, ROUNDS, RunFolder
from lightcl.scenario import Fleet, Scenario, Stream

IDS = [(0, 1, 2), (0, 2), (1,), ()]
TIL = [
    {0: [0.9], 1: [0.8, 0.7], 2: [0.6, 0.7, 0.8]},  # average 0.7; forgetting (0.3 + 0.0) / 2
    {0: [0.5], 2: [0.4, 1.0]},  # average 0.7; forgetting 0.1
    {1: [0.4]},  # average 0.4; nothing to forget
]


def row(device: int, task: int) -> DeviceRow:
    tested = [number for number in IDS[device] if number <= task]
    tasks = None if tested == list(range(len(tested))) else tested
    return DeviceRow(task + 1, device, "node", task, 1, examples=10, tasks=tasks, til=TIL[device][task])


def make_run(path: Path) -> RunFolder:
    folder = RunFolder(path)
    shares = [{"device": d, "train": [d], "test": [d]} for d in range(4)]
    shares = [s | ({} if len(IDS[d]) == 3 else {"tasks": list(IDS[d]), "skipped": []}) for d, s in enumerate(shares)]
    folder.begin(Scenario(stream=Stream(tasks=3), fleet=Fleet(devices=4)), {"run": "r"}, shares)
    for task in range(3):
        rows = [row(device, task) for device in range(3) if task in TIL[device]]
        folder.append(DEVICES, rows)
        folder.append(ROUNDS, [RoundRow.of(rows, 0, 1.0, 1.0)])
    finished = [{"til": til, "cil": {}} for til in TIL]
    folder.finish(Results.of(finished, 3, ids=IDS[:3], devices=4, dropped={}, rounds=folder.rounds(), without_tasks=1))
    return folder


def test_matrices_have_holes_and_figures_are_over_what_was_learned(tmp_path: Path) -> None:
    make_run(tmp_path)
    run = load_run(tmp_path)
    nan = math.nan
    np.testing.assert_array_equal(run.matrices()[1].values, [[0.5, nan, nan], [nan] * 3, [0.4, nan, 1.0]])
    assert [(h.number, h.tasks, h.tasks_done, h.finished) for h in run.histories] == [
        (0, (0, 1, 2), 3, True), (1, (0, 2), 2, True), (2, (1,), 1, True),
    ]  # fmt: skip
    assert run.tasks_of(3) == ()
    assert run.histories[1].figures["til"]["forgetting"] == pytest.approx(0.1)
    assert math.isnan(run.histories[2].figures["til"]["forgetting"])


def test_the_results_count_the_devices_behind_each_figure(tmp_path: Path) -> None:
    make_run(tmp_path)
    results = load_run(tmp_path).results
    assert results is not None
    assert (results.devices, results.devices_finished, results.without_tasks) == (4, 3, 1)
    assert results.til.average_accuracy.mean == pytest.approx(0.6)  # (0.7 + 0.7 + 0.4) / 3
    assert results.til.forgetting.mean == pytest.approx(0.125)  # (0.15 + 0.1) / 2
    assert results.til.devices == {"average_accuracy": 3, "forgetting": 2, "backward_transfer": 2}


def test_a_row_names_its_tasks_only_where_one_is_skipped(tmp_path: Path) -> None:
    make_run(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / DEVICES).read_text().splitlines()]
    assert [r.get("tasks") for r in rows if r["device"] == 0] == [None, None, None]
    assert [r.get("tasks") for r in rows if r["device"] == 1] == [None, [0, 2]]
    assert [r.get("tasks") for r in rows if r["device"] == 2] == [[1]]
    assert row(0, 1).tested == [0, 1]


def test_a_device_missing_from_partition_json_learns_all_tasks(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    (folder.path / "partition.json").unlink()
    history = load_run(tmp_path).histories[1]
    assert history.tasks == (0, 1, 2)
    assert not history.finished
    assert history.til.learned.tolist() == [0, 2]  # its rows say so


def test_only_entries_of_partition_json_that_name_a_task_count_as_skipped(tmp_path: Path) -> None:
    skipped = [{"task": 1, "reason": "no test image"}, {"task": 7}, 2, {"task": True}]
    rows = [{"device": 0, "skipped": skipped}, {"device": 1, "skipped": "all"}, {"device": 2}]
    RunFolder(tmp_path).begin(Scenario(stream=Stream(tasks=3), fleet=Fleet(devices=4)), {"run": "r"}, rows)
    run = load_run(tmp_path)
    assert [run.skipped_of(device) for device in range(4)] == [[skipped[0]], [], [], []]


def test_a_figure_that_no_device_has_is_null_on_disk(tmp_path: Path) -> None:
    results = Results.of([{"til": {1: [0.4]}, "cil": {}}], 3, ids=[(1,)], devices=1, dropped={}, rounds=[])
    folder = RunFolder(tmp_path)
    folder.begin(Scenario(), {}, [])
    folder.finish(results)
    values = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert values["til"]["forgetting"] is None
    read = folder.results()
    assert read is not None
    assert math.isnan(read.til.forgetting.mean)
    assert read.til.average_accuracy.mean == 0.4
    assert read.til.devices == {"average_accuracy": 1, "forgetting": 0, "backward_transfer": 0}


def test_boards_with_images_of_their_own_may_skip_tasks(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    folder.note_own_data([0, 2], {0: (1, 2)})
    run = load_run(tmp_path)
    assert (run.tasks_of(0), run.tasks_of(1), run.tasks_of(2)) == ((1, 2), (0, 2), (0, 1, 2))
