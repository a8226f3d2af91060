"""Rows on disk: unchanged content, and errors that name file, line and field."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from lightcl.errors import RequestError
from lightcl.exchange.messages import Tested, Trained
from lightcl.records import DeviceRow, Failure, Results, RoundRow
from lightcl.records.folder import DEVICES, RunFolder
from lightcl.scenario import Scenario

TRAINED = Trained(0, 1, 2, 3, "p", "c", examples=22, loss=0.5, seconds=0.75, peak_memory_mib=100.5)
TESTED = Tested(0, 1, 2, 3, tasks=[0, 1], til=[0.5, 1.0], cil=[0.25, 0.5], images=[8, 4], seconds=0.125)
ON_DISK = (
    '{"round": 4, "device": 0, "name": "vm-0", "task": 1, "epochs": 2, "bytes_down": 7, "bytes_up": 9, "timing": '
    '{"train_seconds": 0.75, "peak_memory_mib": 100.5, "evaluate_seconds": 0.125}, "examples": 22, "loss": 0.5, '
    '"til": [0.5, 1.0], "images": [8, 4], "cil": [0.25, 0.5]}'
)


def full_row() -> DeviceRow:
    row = DeviceRow(4, 0, "vm-0", 0, 0, bytes_down=7, bytes_up=9)
    row.add_training_(TRAINED)
    row.add_test_(TESTED)
    return row


def test_a_devices_row_is_written_as_before_and_read_back() -> None:
    assert json.dumps(full_row().to_json()) == ON_DISK
    assert DeviceRow.from_json(json.loads(ON_DISK)) == full_row()


def test_what_a_device_did_not_reach_is_not_in_its_row() -> None:
    row = DeviceRow(1, 2, "", 0, 0, error="late")
    assert row.to_json() == {
        "round": 1, "device": 2, "name": "", "task": 0, "epochs": 0, "bytes_down": 0, "bytes_up": 0, "timing": {},
        "error": "late",
    }  # fmt: skip
    assert DeviceRow.from_json(row.to_json()) == row


def test_a_rounds_row_sums_and_averages_its_devices() -> None:
    other = DeviceRow(4, 1, "vm-1", 1, 2, bytes_up=1, loss=1.5, til=[0.25, 0.75], error="late")
    row = RoundRow.of([full_row(), other], 0, 1.0, 2.0)
    assert (row.round, row.task, row.devices, row.failed, row.loss) == (4, 1, 2, 1, 1.0)
    assert (row.bytes_down, row.bytes_up) == (7, 10)
    assert row.til is not None
    assert row.cil is not None
    # TIL 0.75 and 0.5; the sample's deviation is 0.25 / sqrt(2). CIL of one device alone.
    assert (row.til.mean, row.til.std) == pytest.approx((0.625, 0.25 / math.sqrt(2)))
    assert (row.cil.mean, row.cil.std) == (0.375, 0.0)
    assert RoundRow.from_json(json.loads(json.dumps(row.to_json()))) == row


def test_results_and_failures_are_read_back() -> None:
    rows = {"til": {0: [0.5], 1: [0.25, 1.0]}, "cil": {}}
    rounds = [RoundRow.of([full_row()], 1, 1.0, 2.0)] * 2
    results = Results.of([rows], 2, devices=2, dropped={1: "late"}, rounds=rounds)
    assert results.til.average_accuracy.mean == 0.625
    assert results.til.forgetting.mean == 0.25
    assert results.cil is None
    assert (results.rounds, results.bytes_up, results.seconds) == (2, 18, 4.0)
    assert json.loads(json.dumps(results.to_json()))["dropped"] == {"1": "late"}
    assert Results.from_json(json.loads(json.dumps(results.to_json()))) == results
    failure = Failure("no device", {3: "gone"})
    assert Failure.from_json(failure.to_json()) == failure


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("task", "one", 'task is "one", expected an integer'),
        ("task", True, "task is true, expected an integer"),
        ("til", [0.5, None], r"til is \[0.5, null\], expected a list of numbers"),
        ("images", 3, "images is 3, expected a list of integers"),
        ("timing", [], r"timing is \[\], expected an object"),
        ("timing", {"train_seconds": "x"}, r'timing.train_seconds is "x", expected a number'),
        ("error", 5, "error is 5, expected a text"),
        ("name", None, "name is null, expected a text"),
        ("round", ..., "round is missing"),
    ],
)
def test_a_wrong_row_is_named_by_file_line_and_field(tmp_path: Path, field: str, value: Any, said: str) -> None:
    wrong = json.loads(ON_DISK) | {field: value}
    if value is ...:
        del wrong[field]
    folder = RunFolder(tmp_path)
    folder.begin(Scenario(), {}, [])
    (tmp_path / DEVICES).write_text(f"{ON_DISK}\n{json.dumps(wrong)}\n")
    with pytest.raises(RequestError, match=rf"devices\.jsonl, line 2: not a row of a run: {said}"):
        folder.devices()
