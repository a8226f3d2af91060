"""A run whose server lost its state: rows are never removed, and it continues where that is possible."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message

from lightcl.errors import Failure, RequestError
from lightcl.records import load_run
from lightcl.records.folder import DEVICES, EVENTS, ROUNDS, RunFolder
from lightcl.records.rows import Results
from lightcl.scenario import Scenario
from lightcl.storage.state import StateError
from server.checkpoint import DATABASE
from server.rounds import Coordinator
from tests.inprocess import InProcessGrid, Silent, small

TASKS = small(stream={"tasks": 3}, training={"epochs": 1, "learning_rate": 0.01})
SHARED = small(stream={"tasks": 2}, training={"epochs": 1}, server={"aggregation": "suffix"})


class Killed(BaseException):
    pass


class Warned(Silent):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warned(self, text: str) -> None:
        self.warnings.append(text)


def go_on(path: Path, scenario: Scenario, grid: InProcessGrid, listener: Silent | None = None) -> Results:
    """As `--resume` does: the folder is checked before."""
    folder = RunFolder(path)
    if folder.exists:
        folder.prepare(resume=True, overwrite=False)
    else:
        folder.begin(scenario, {"run": "r"}, [])
    return Coordinator(scenario, folder, "r", listener or Silent()).run(grid)


def killed_in_round(number: int, tmp_path: Path, scenario: Scenario, kind: str = "train") -> Path:
    """A run that is killed while device 1 replies in this round."""

    def kill(message: Message, reply: Message) -> Message:
        told = message.content["instruction"]
        if message.metadata.message_type == kind and (told["round"], told["device"]) == (number, 1):
            raise Killed
        return reply

    with pytest.raises(Killed):
        go_on(tmp_path / "run", scenario, InProcessGrid(tmp_path / "s", 3, kill))
    return tmp_path / "run"


def rows(path: Path, name: str = DEVICES) -> list[dict[str, Any]]:
    lines = (path / name).read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in ("timing", "name")} for line in lines]


def _delete(run: Path) -> None:
    shutil.rmtree(run / "server")


def _delete_database(run: Path) -> None:
    for file in (run / "server").glob(f"{DATABASE}*"):
        file.unlink()


def _empty(run: Path) -> None:
    _delete_database(run)
    (run / "server" / DATABASE).touch()


def _truncate(run: Path) -> None:
    _checkpoint(run)
    data = (run / "server" / DATABASE).read_bytes()
    (run / "server" / DATABASE).write_bytes(data[: len(data) // 2])


def _garbage(run: Path) -> None:
    _delete_database(run)
    (run / "server" / DATABASE).write_bytes(b"no database" * 1000)


def _flip(run: Path) -> None:
    """One digit of what a device has learned."""
    _checkpoint(run)
    data = bytearray((run / "server" / DATABASE).read_bytes())
    at = data.index(b'"epochs": 1')
    data[at + 10] = ord("0")
    (run / "server" / DATABASE).write_bytes(bytes(data))


def _older_form(run: Path) -> None:
    with sqlite3.connect(run / "server" / DATABASE) as database:
        database.execute("PRAGMA user_version = 0")
    database.close()


def _checkpoint(run: Path) -> None:
    """Everything into the database file itself."""
    with sqlite3.connect(run / "server" / DATABASE) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    database.close()


SCENARIOS = [pytest.param(TASKS, id="nothing shared"), pytest.param(SHARED, id="shared")]
DAMAGES = [_delete, _delete_database, _empty, _truncate, _garbage, _flip, _older_form]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The rows of the run that nothing happens to."""
    path = tmp_path_factory.mktemp("whole")
    go_on(path / "run", TASKS, InProcessGrid(path / "s", 3))
    return rows(path / "run")


@pytest.mark.parametrize("damage", DAMAGES)
def test_where_nothing_is_shared_the_state_is_rebuilt_from_the_rows(
    tmp_path: Path, damage: Callable[[Path], None], whole: list[dict[str, Any]]
) -> None:
    run = killed_in_round(3, tmp_path, TASKS)
    damage(run)
    listener = Warned()
    assert go_on(run, TASKS, InProcessGrid(tmp_path / "s", 3), listener).devices_finished == 3
    assert rows(run) == whole
    assert len(listener.warnings) == 1
    assert "it was rebuilt from the rows of 2 rounds" in listener.warnings[0]


@pytest.mark.parametrize("damage", [_delete, _empty, _truncate, _flip])
def test_where_tensors_are_shared_it_is_refused_and_the_rows_stay(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    run = killed_in_round(2, tmp_path, SHARED)
    before = {name: (run / name).read_text() for name in (DEVICES, ROUNDS)}
    damage(run)
    grid = InProcessGrid(tmp_path / "s", 3)
    for _ in range(2):  # a second try says the same
        with pytest.raises(StateError, match=r"tensors that the fleet shares are lost.*from a backup.*--overwrite"):
            go_on(run, SHARED, grid)
        assert {name: (run / name).read_text() for name in (DEVICES, ROUNDS)} == before
    assert not grid.sent
    failure = load_run(run).failure
    assert failure is not None
    assert "are lost" in failure.reason


def test_tensors_with_a_flipped_bit_are_not_used(tmp_path: Path) -> None:
    run = killed_in_round(2, tmp_path, SHARED)
    file = next((run / "server").glob("tensors-*"))
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(StateError, match=r"tensors-\d+\.safetensors is damaged"):
        go_on(run, SHARED, InProcessGrid(tmp_path / "s", 3))


def test_a_shared_run_that_is_over_is_written_without_its_state(tmp_path: Path) -> None:
    results = go_on(tmp_path / "run", SHARED, InProcessGrid(tmp_path / "s", 3))
    (tmp_path / "run" / "results.json").unlink()
    _delete(tmp_path / "run")
    nobody = InProcessGrid(tmp_path / "s", 3)
    nobody.away = set(nobody.nodes)
    assert go_on(tmp_path / "run", SHARED, nobody) == results


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_state_of_a_newer_version_is_refused_and_kept(tmp_path: Path, scenario: Scenario) -> None:
    run = killed_in_round(2, tmp_path, scenario)
    with sqlite3.connect(run / "server" / DATABASE) as database:
        database.execute("PRAGMA user_version = 99")
    database.close()
    before = (run / DEVICES).read_text()
    with pytest.raises(StateError, match=r"newer version of lightcl-fleet .*update"):
        go_on(run, scenario, InProcessGrid(tmp_path / "s", 3))
    assert (run / DEVICES).read_text() == before
    assert (run / "server" / DATABASE).exists()


def test_a_state_from_an_old_backup_does_not_remove_rows(tmp_path: Path, whole: list[dict[str, Any]]) -> None:
    run = killed_in_round(2, tmp_path, TASKS)
    shutil.copytree(run / "server", tmp_path / "backup")

    def kill(message: Message, reply: Message) -> Message:
        told = message.content["instruction"]
        if message.metadata.message_type == "train" and (told["task"], told["device"]) == (2, 2):
            raise Killed
        return reply

    with pytest.raises(Killed):
        go_on(run, TASKS, InProcessGrid(tmp_path / "s", 3, kill))
    with (run / ROUNDS).open() as file:
        assert len(file.readlines()) == 2
    shutil.rmtree(run / "server")
    shutil.copytree(tmp_path / "backup", run / "server")
    go_on(run, TASKS, InProcessGrid(tmp_path / "s", 3))
    assert rows(run) == whole


def test_rows_that_are_gone_are_missed_where_the_state_is_there(tmp_path: Path) -> None:
    run = killed_in_round(3, tmp_path, TASKS)
    (run / DEVICES).unlink()
    (run / ROUNDS).unlink()
    with pytest.raises(StateError, match=r"end with round 0, the server's state with round 2; restore the rows"):
        go_on(run, TASKS, InProcessGrid(tmp_path / "s", 3))


def test_rows_of_one_device_that_are_gone_are_missed(tmp_path: Path) -> None:
    run = killed_in_round(3, tmp_path, TASKS)
    lines = (run / DEVICES).read_text().splitlines(keepends=True)
    (run / DEVICES).write_text("".join(lines[:1] + lines[2:]))
    with pytest.raises(RequestError, match="rows are missing"):
        go_on(run, TASKS, InProcessGrid(tmp_path / "s", 3))


@pytest.mark.parametrize("tail", [b'{"round": 3, "dev', b"\0" * 512, b'{"time": "2026', b"\xff\xfe"])
def test_last_lines_that_a_power_cut_damaged(tmp_path: Path, tail: bytes, whole: list[dict[str, Any]]) -> None:
    run = killed_in_round(3, tmp_path, TASKS)
    for name in (DEVICES, ROUNDS, EVENTS):
        with (run / name).open("ab") as file:
            file.write(tail)
    go_on(run, TASKS, InProcessGrid(tmp_path / "s", 3))
    assert rows(run) == whole
    events = [json.loads(line) for line in (run / EVENTS).read_text().splitlines()]
    assert [event["event"] for event in events].count("round_finished") == 3


@pytest.mark.parametrize("error", [MemoryError, RecursionError, ZeroDivisionError, OSError, Failure, RequestError])
def test_a_server_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    """Whatever is raised where no reply is at work."""

    def fail(*given: object) -> None:
        raise error("made up")

    monkeypatch.setattr("server.selection.Selection.choose", fail)
    with pytest.raises(error, match="made up"):
        go_on(tmp_path / "run", TASKS, InProcessGrid(tmp_path / "s", 3))
    failure = load_run(tmp_path / "run").failure
    assert failure is not None
    assert "made up" in failure.reason
    monkeypatch.undo()
    assert go_on(tmp_path / "run", TASKS, InProcessGrid(tmp_path / "s", 3)).devices_finished == 3
    assert load_run(tmp_path / "run").failure is None


class FullDisk(Silent):
    """From round 2 on, the disk has no room for one of the files: what is written goes to /dev/full."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file = file

    def round_started(self, number: int, rounds_left: int, devices: int) -> None:
        if number == 2:
            self.file.parent.mkdir(exist_ok=True)
            kept = self.file.with_name("kept")
            if self.file.exists():
                self.file.rename(kept)
            self.file.symlink_to("/dev/full")

    def make_room(self) -> None:
        self.file.unlink(missing_ok=True)
        if self.file.with_name("kept").exists():
            self.file.with_name("kept").rename(self.file)


@pytest.mark.parametrize(
    "file", [DEVICES, ROUNDS, EVENTS, f".results.json.{os.getpid()}.partial"], ids=[DEVICES, ROUNDS, EVENTS, "results"]
)
def test_a_full_disk_ends_the_run_with_a_reason_and_resume_loses_nothing(
    tmp_path: Path, file: str, whole: list[dict[str, Any]]
) -> None:
    run, grid = tmp_path / "run", InProcessGrid(tmp_path / "s2", 3)
    disk = FullDisk(run / file)
    with pytest.raises(Failure, match="No space left on device"):
        go_on(run, TASKS, grid, disk)
    disk.make_room()
    failure = load_run(run).failure
    assert failure is not None
    assert "No space left on device" in failure.reason
    assert go_on(run, TASKS, grid).devices_finished == 3
    assert rows(run) == whole


def test_results_are_kept_where_the_run_cannot_be_continued(tmp_path: Path) -> None:
    """A completed run without one device, whose state is then damaged."""

    def lost(message: Message, reply: Message) -> Message | None:
        told = message.content["instruction"]
        return None if message.metadata.message_type == "train" and told["device"] == 1 else reply

    scenario = small(server={"aggregation": "suffix", "max_failures": 1, "round_timeout": 0.2, "connect_timeout": 0.3})
    results = go_on(tmp_path / "run", scenario, InProcessGrid(tmp_path / "s", 3, lost))
    assert results.dropped
    _garbage(tmp_path / "run")
    with pytest.raises(StateError, match="are lost"):
        go_on(tmp_path / "run", scenario, InProcessGrid(tmp_path / "s", 3))
    assert RunFolder(tmp_path / "run").results() == results
    assert not (tmp_path / "run" / "failure.json").exists()


@pytest.mark.parametrize(("kind", "said"), [("train", "those of the round before"), ("evaluate", "repeats the round")])
def test_damaged_shared_tensors_do_not_cost_the_run(tmp_path: Path, kind: str, said: str) -> None:
    """Killed in the training of round 4, when the tensors of round 3 are the newest, and between training and test."""
    chosen = small(
        stream={"tasks": 2}, training={"epochs": 2}, server={"aggregation": "suffix", "rounds_per_task": 2}
    )  # fmt: skip
    go_on(tmp_path / "whole", chosen, InProcessGrid(tmp_path / "s-whole", 3))
    run = killed_in_round(4, tmp_path, chosen, kind)
    newest = max((run / "server").glob("tensors-*"), key=lambda file: file.stat().st_mtime_ns)
    newest.write_bytes(newest.read_bytes()[:-1])
    listener = Warned()
    results = go_on(run, chosen, InProcessGrid(tmp_path / "s", 3), listener)
    assert len(listener.warnings) == 1
    assert said in listener.warnings[0]
    found, expected = (
        [[row[key] for key in ("round", "device", "task", "epochs")] for row in rows(path)]
        for path in (run, tmp_path / "whole")
    )
    assert found == expected
    assert (results.rounds, results.devices_finished) == (4, 3)
    for row, wanted in zip(rows(run), rows(tmp_path / "whole"), strict=True):
        assert row.get("til", []) == pytest.approx(wanted.get("til", []), abs=0.1)


def test_lost_sums_are_not_replaced(tmp_path: Path) -> None:
    chosen = small(
        stream={"tasks": 3}, training={"epochs": 1}, method={"name": "lightcl-plus", "share_statistics": True},
    )  # fmt: skip
    assert chosen.method.sums_statistics
    run = killed_in_round(3, tmp_path, chosen)
    for file in (run / "server").glob("tensors-*"):
        file.unlink()
    with pytest.raises(StateError, match="cannot be read"):
        go_on(run, chosen, InProcessGrid(tmp_path / "s", 3))
