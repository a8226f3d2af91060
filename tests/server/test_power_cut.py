"""The server's files after a power cut: no finished round is lost, and none is half there."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

import pytest

from lightcl.errors import Failure, RequestError
from lightcl.records import folder as records
from lightcl.records.folder import RunFolder
from lightcl.records.rows import RoundRow
from server import checkpoint
from server.checkpoint import Checkpoint
from server.journal import Journal
from server.ledger import Ledger
from server.rounds import Coordinator
from tests.inprocess import InProcessGrid, Silent, small
from tests.power_cut import Recorder, in_memory, put_back, states

__all__ = ["in_memory"]  # a fixture

SCENARIO = small(
    fleet={"devices": 2, "test_data": "whole"}, stream={"tasks": 3}, training={"epochs": 1},
    server={"aggregation": "suffix"},
)  # fmt: skip
Point = tuple[int, int]
"""A round, and how far it is: 1 its training is saved, 2 it is finished."""


class Promises(Silent):
    """What the server may rely on: devices adopt the new model when they are tested, so it must be safe by then."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder, self._round = recorder, 0

    def round_started(self, number: int, rounds_left: int, devices: int) -> None:
        self._round = number

    def phase_started(self, phase: str, devices: int) -> None:
        if phase == "evaluate":
            self._recorder.promise((self._round, 1))

    def round_finished(self, row: RoundRow) -> None:
        self._recorder.promise((self._round, 2))


Rows = dict[str, list[Any]]


def recorded(place: Path, *, durable: bool = True) -> tuple[Recorder, Rows]:
    """A run of three rounds with real devices, whose states are elsewhere; and its rows."""
    disk = place / "disk"
    disk.mkdir()
    recorder = Recorder(disk)
    with recorder.recording():
        folder = RunFolder(disk / "runs" / "run")
        folder.begin(SCENARIO, {"run": "r"}, [])
        recorder.promise((0, 2))
        coordinator = Coordinator(SCENARIO, folder, "r", Promises(recorder), durable=durable)
        coordinator.run(InProcessGrid(place / "states", 2))
        recorder.promise("complete")
    return recorder, {"rounds": folder.rounds(), "devices": folder.devices()}


def found_in(path: Path, rows: Rows) -> Point | str | None:
    """The point from which a run would continue; None where there is none. Raises what `--resume` raises, and
    AssertionError for rows or a model that are not those of this point."""
    folder = RunFolder(path)
    if not folder.exists:
        return None
    folder.prepare(resume=True, overwrite=False)
    complete, stored = folder.completed, Checkpoint(path / "server")
    try:
        saved = Journal(folder, stored, Ledger(SCENARIO)).restore(Silent())
    finally:
        stored.close()
    if saved is None:
        assert (folder.rounds(), folder.devices()) == ([], [])
        return 0, 2
    point = (saved.round, 1 if saved.pending else 2)
    finished = saved.round - bool(saved.pending)
    assert folder.rounds() == rows["rounds"][:finished]
    assert folder.devices() == [row for row in rows["devices"] if row.round <= finished]
    assert saved.pending is None or {row.round for row in saved.pending.rows.values()} == {saved.round}
    assert saved.tensors, "the model"
    assert saved.version == saved.round, "it moves once per round"
    return "complete" if complete else point


def worse(promised: Any, tree: Any, place: Path, rows: Rows) -> str:
    """Why a state of the disk is worse than what was promised; empty where it is not."""
    folder = put_back(tree, place)
    try:
        with patch.object(os, "fsync"):
            found = found_in(folder / "runs" / "run", rows)
    except (Failure, RequestError, AssertionError) as error:
        return f"{promised} was promised: {error}"
    finally:
        shutil.rmtree(folder)
    if promised is None or found == "complete":
        return ""
    if promised == "complete" or not isinstance(found, tuple) or found < promised:
        return f"{promised} was promised, {found} is there"
    return ""


def test_power_cuts_cost_no_round_that_was_saved(in_memory: Path) -> None:
    recorder, rows = recorded(in_memory)
    found = list(states(recorder, Random(0), 10))
    for promised, tree in found:
        assert not worse(promised, tree, in_memory / "after", rows)
    assert len(found) > 400, "different states"


@pytest.mark.parametrize("without", ["durable", "sync of the tensors", "sync of the name of new rows"])
def test_the_double_finds_each_sync_that_is_missing(
    in_memory: Path, without: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if without == "sync of the tensors":
        monkeypatch.setattr(checkpoint, "sync", lambda path: None)
    elif without == "sync of the name of new rows":
        monkeypatch.setattr(records, "sync", lambda path: None)
    recorder, rows = recorded(in_memory, durable=without != "durable")
    tried = (worse(promised, tree, in_memory / "after", rows) for promised, tree in states(recorder, Random(0), 6))
    assert any(tried)
