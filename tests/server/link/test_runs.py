"""Which runs a server remembers, which it starts again, and how often."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from lightcl.errors import RequestError
from lightcl.records.folder import RunFolder
from lightcl.records.rows import Failure
from lightcl.scenario import load_scenario
from server.link.folder import ServerFolder, Settings
from server.link.progress import EventWatch, Progress
from server.link.runs import Run, Runs, prepare
from server.link.supervisor import only_server
from tests.inprocess import InProcessGrid, small
from tests.server.test_rounds import start
from tests.simulations.test_command_line import lightcl


@pytest.fixture
def folder(tmp_path: Path) -> ServerFolder:
    settings = Settings("127.0.0.1", devices=2, insecure=True)
    return ServerFolder.create(tmp_path / "server", settings, ["127.0.0.1"], overwrite=False)


def test_a_run_that_gets_further_is_started_again_without_end() -> None:
    run = Run(1, "x", "/out", "now")
    for rounds in range(1, 50):
        run = run.after_end(rounds, "power")
        assert (run.state, run.failures, run.pause) == ("waiting", 1, 10.0)


def test_three_failures_without_a_finished_round_end_it() -> None:
    run = Run(1, "x", "/out", "now").after_end(4, "a")
    assert (run.failures, run.rounds, run.pause) == (1, 4, 10.0)
    run = run.after_end(4, "b")
    assert (run.state, run.failures, run.pause) == ("waiting", 2, 60.0)
    run = run.after_end(4, "c")
    assert (run.state, run.failures, run.reason, run.open) == ("failed", 3, "c", False)
    # without any round from the start on
    first = Run(1, "x", "/out", "now").after_end(0, "a").after_end(0, "b")
    assert first.open
    assert first.after_end(0, "c").state == "failed"


def test_the_same_request_is_the_same_run(folder: ServerFolder, tmp_path: Path) -> None:
    runs, out = Runs(folder), tmp_path / "run"
    first, said = runs.ask("tiny", [], small(), out)
    assert "waiting" in said
    again, said = runs.ask("tiny", [], small(), out)
    assert (again, "continues" in said) == (first, True)
    assert load_scenario(runs.scenario_file(first)) == small(), "as it was asked for, whatever becomes of the file"
    with pytest.raises(RequestError, match="another scenario"):
        runs.ask("tiny", [], small(stream={"tasks": 1}), out)
    other, _ = runs.ask("tiny", [], small(), tmp_path / "other")
    assert [one.number for one in runs.all()] == [first.number, other.number] == [1, 2]
    runs.save(replace(first, state="failed", failures=3, reason="x"))
    tried, said = runs.ask("tiny", [], small(), out)
    assert (tried.state, tried.failures, "tried again" in said) == ("waiting", 0, True)


def test_an_output_folder_of_other_files_is_refused(folder: ServerFolder, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(RequestError, match="other files"):
        Runs(folder).ask("tiny", [], small(), tmp_path)
    assert Runs(folder).all() == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("no-such-scenario",), "no-such-scenario"),
        (("quickstart", "--set", "training.epochs=0"), "training.epochs"),
        (("quickstart", "--set", "fleet.devices=1"), "the fleet has 2 boards"),
        (("quickstart", "--set", "server.strategy=Best"), "server.strategy"),
        (("-",), "a server needs a file"),
        (("quickstart", "--set", "fleet.devices=2", "--out", f"{__file__}/run"), "is not a folder"),
        (("--out", "run"), "name its SCENARIO"),
    ],
)
def test_what_a_server_refuses_before_it_starts(
    folder: ServerFolder, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
    arguments: tuple[str, ...], said: str,
) -> None:  # fmt: skip
    assert lightcl(monkeypatch, "server", "run", *arguments, "--folder", folder.path) == 2
    assert said in capfd.readouterr().err
    assert Runs(folder).all() == []
    assert not folder.database.exists()


def test_a_second_server_on_one_folder_is_refused(folder: ServerFolder) -> None:
    with only_server(folder), pytest.raises(RequestError, match="lightcl server start"), only_server(folder):
        pass
    with only_server(folder):
        pass


def test_a_run_is_asked_for_while_no_server_runs(
    folder: ServerFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert lightcl(monkeypatch, "server", "start", "quickstart", "--out", out, "--folder", folder.path) == 0
    assert "starts with `lightcl server run`" in capfd.readouterr().out
    (run,) = Runs(folder).all()
    assert (run.given, run.out, run.state) == ("quickstart", str(out), "waiting")


def test_the_freeze_point_needs_images(tmp_path: Path) -> None:
    changes = ["network.freeze=auto", "data.source=image-folder"]
    with pytest.raises(RequestError, match="no images to choose from"):
        prepare(Path("quickstart"), changes, tmp_path / "run", 0)


def test_events_are_shown_once_and_only_whole_ones(tmp_path: Path) -> None:
    old = {"time": "t", "event": "connected", "devices": 1, "wanted": 2}
    (tmp_path / "events.jsonl").write_text(json.dumps(old) + "\n")
    shown: list[str] = []
    watch = EventWatch(7, tmp_path, shown.append)
    watch.show()
    assert shown == []
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write(
            json.dumps({"time": "t", "event": "round_started", "round": 2, "devices": 2, "rounds_left": 3}) + "\n"
        )
        file.write("no JSON\n" + json.dumps({"time": "t", "event": "refused", "device": 1, "reason": "hot"})[:20])
        file.flush()
        watch.show()
        assert shown == ["run 7: round 2: 2 devices, about 3 rounds left"]
        file.write(json.dumps({"time": "t", "event": "refused", "device": 1, "reason": "hot"})[20:] + "\n")
    watch.show()
    assert shown[1:] == ["run 7: device 1: hot"]


def test_a_run_folder_is_read_as_the_run_writes_it(tmp_path: Path) -> None:
    folder, progress = RunFolder(tmp_path / "run"), Progress(tmp_path / "run")
    assert (progress.begun, progress.complete, progress.rounds, progress.failure()) == (False, False, 0, "")
    shown: list[str] = []
    watch = EventWatch(1, folder.path, shown.append)
    results = start(small(stream={"tasks": 1}), folder.path).run(InProcessGrid(tmp_path / "states", 3))
    assert (progress.begun, progress.complete, progress.rounds) == (True, True, results.rounds)
    assert progress.results()["devices_finished"] == 3
    watch.show()
    row = folder.rounds()[-1]
    assert row.til is not None
    assert shown[-1].startswith(f"run 1: round {row.round} finished: TIL {100 * row.til.mean:.1f} %")
    folder.fail(Failure("the disk is full", {}))
    assert progress.failure() == "the disk is full"
    with (folder.path / "rounds.jsonl").open("a") as file:
        file.write('{"round": 9')
    assert progress.rounds == results.rounds, "half a line is no round"
