"""`lightcl analyze` and `network.freeze: auto` from the command line to the files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from flwr.app import Context, RecordDict

from lightcl import preparation
from lightcl.errors import RequestError
from lightcl.exchange.messages import INSTRUCTION, Instruction
from lightcl.preparation import open_remote_run
from lightcl.records.folder import RunFolder
from lightcl.scenario import load_scenario
from server.app import app as server
from simulations.reports import page as report
from tests.inprocess import InProcessGrid
from tests.simulations.test_command_line import lightcl

SCENARIO = """\
name: tiny
network: {weights: none, width: 4, freeze_threshold: 0.5, analysis_epochs: 1}
stream: {tasks: 2}
fleet: {devices: 6, test_data: whole}
training: {epochs: 1, batch_size: 16}
"""


@pytest.fixture
def scenario(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "tiny.yaml"
    file.write_text(SCENARIO)
    return file


def test_an_analysis_from_the_command_line_to_the_picture(
    scenario: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert lightcl(monkeypatch, "analyze", scenario, "--device", 1, "--out", "found", "--threshold", 0.3) == 0
    printed = capfd.readouterr().out
    found = json.loads(Path("found/generalizability.json").read_text())
    assert f"freeze point at threshold 0.3: {found['freeze']}" in printed
    assert "layer4.1" in printed
    assert (found["device"], found["epochs"], found["threshold"], found["tasks"]) == (1, 1, 0.3, [1])
    assert len(found["blocks"]) == 9
    for block in found["blocks"].values():
        assert all(0 <= value <= 1 for figure in block.values() for value in figure)
        assert [len(figure) for figure in block.values()] == [1, 1, 1]
    assert found["scenario"]["network"]["width"] == 4
    assert Path("found/generalizability.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(f.name for f in Path("found").iterdir()) == ["generalizability.json", "generalizability.png"]

    assert lightcl(monkeypatch, "analyze", scenario, "--out", "found") == 2
    assert "replace it with --overwrite" in capfd.readouterr().err
    assert json.loads(Path("found/generalizability.json").read_text()) == found
    assert lightcl(monkeypatch, "analyze", scenario, "--device", 1, "--out", "found", "--overwrite") == 0
    again = json.loads(Path("found/generalizability.json").read_text())
    assert (again["threshold"], again["blocks"]) == (0.5, found["blocks"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--set", "stream.tasks=1"), "stream.tasks is 1"),
        (("--set", "stream.tasks=6"), "data.source has 10"),
        (("--threshold", "2"), "is not in the range"),
        (("--device", "6"), "allowed: 0 to 5"),
        (("--set", "network.weights=nothing.safetensors"), "no such file"),
        (("--set", "network.freeze_threshold=1.5"), "network.freeze_threshold"),
        (("--set", "network.analysis_epochs=0"), "network.analysis_epochs"),
    ],
)
def test_a_wrong_request_ends_with_2_and_writes_nothing(
    scenario: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert lightcl(monkeypatch, "analyze", scenario, *words, "--out", "found") == 2
    assert said in capfd.readouterr().err
    assert not Path("found").exists()


def test_other_files_are_left_alone(
    scenario: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("keep")
    for option in ([], ["--overwrite"]):
        assert lightcl(monkeypatch, "analyze", scenario, "--out", "mine", *option) == 2
        assert "holds other files (notes.txt)" in capfd.readouterr().err
    assert [f.name for f in Path("mine").iterdir()] == ["notes.txt"]
    assert lightcl(monkeypatch, "analyze", scenario, "--out", "tiny.yaml") == 2
    assert lightcl(monkeypatch, "analyze", scenario, "--out", "tiny.yaml/found") == 2
    assert "cannot be written to" in capfd.readouterr().err


# -- freeze: auto --------------------------------------------------------------------------------------------------

AUTO = ("--set", "network.freeze=auto")


def test_auto_is_chosen_once_and_kept(
    scenario: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "build_report", lambda folder: folder.path / "report.html")  # seconds of drawing
    assert lightcl(monkeypatch, "train", scenario, "--device", 1, "--out", "run", *AUTO) == 0
    printed = capfd.readouterr().out
    analysis = json.loads(Path("run/generalizability.json").read_text())
    point = analysis["freeze"]
    assert point not in ("auto", "layer4.1")
    assert f"network.freeze: auto chose {point}" in printed
    assert analysis["device"] == 0, "the fleet's prefix, whichever device is trained"
    assert json.loads(Path("run/run.json").read_text())["scenario"]["network"]["freeze"] == point
    assert load_scenario(Path("run/scenario.yaml")).network.freeze == point

    # Training the same with the point written out gives the same numbers.
    written = ("--set", f"network.freeze={point}")
    assert lightcl(monkeypatch, "train", scenario, "--device", 1, "--out", "written", *written) == 0
    rows = [json.loads(Path(run, "rounds.jsonl").read_text().splitlines()[1]) for run in ("run", "written")]
    assert rows[0]["loss"] == rows[1]["loss"]

    # A resumed run does not repeat the analysis.
    monkeypatch.setattr(preparation, "analyze", lambda *_: pytest.fail("analyzed again"))
    Path("run/results.json").unlink()
    go_on = ("train", scenario, "--device", 1, "--out", "run", "--resume")
    assert lightcl(monkeypatch, *go_on, *AUTO) == 0
    assert Path("run/results.json").exists()
    assert lightcl(monkeypatch, *go_on, *written) == 0
    capfd.readouterr()
    assert lightcl(monkeypatch, *go_on, *AUTO, "--set", "network.freeze_threshold=0.4") == 2
    assert "network.freeze_threshold was 0.5, now 0.4" in capfd.readouterr().err
    Path("run/generalizability.json").write_text("{}")
    assert lightcl(monkeypatch, *go_on, *AUTO) == 2
    assert "not the record of an analysis" in capfd.readouterr().err
    assert lightcl(monkeypatch, "train", scenario, "--device", 1, "--out", "written", "--resume", *AUTO) == 2
    assert f"network.freeze was '{point}', now 'auto'" in capfd.readouterr().err


def test_auto_is_checked_without_an_analysis(scenario: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "analyze", lambda *_: pytest.fail("a check must not train"))
    assert lightcl(monkeypatch, "validate", scenario, *AUTO) == 0
    assert lightcl(monkeypatch, "validate", scenario, *AUTO, "--set", "stream.tasks=1") == 2
    assert lightcl(monkeypatch, "train", scenario, *AUTO, "--out", "run", "--set", "stream.tasks=1") == 2
    assert not Path("run").exists()


def test_a_point_that_the_method_cannot_do_with_is_refused_before_anything_is_written(
    scenario: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    nothing = ("--set", "network.freeze_threshold=1", "--set", "method.name=lightcl-plus")
    assert lightcl(monkeypatch, "train", scenario, *AUTO, *nothing, "--out", "run") == 2
    assert "network.freeze must be layer1.0 or deeper" in capfd.readouterr().err
    assert not Path("run").exists()


def test_a_server_without_images_refuses_auto(scenario: Path, tmp_path: Path) -> None:
    asked = load_scenario(scenario, ["network.freeze=auto", "data={source: parquet, path: /on/the/boards}"])
    with pytest.raises(RequestError, match="run `lightcl analyze` on a machine that has images"):
        open_remote_run(RunFolder(tmp_path / "run"), asked, "flwr run", resume=False)
    assert not (tmp_path / "run").exists()


def test_the_fleet_gets_the_chosen_point(scenario: Path, tmp_path: Path) -> None:
    grid = InProcessGrid(tmp_path / "states", 2)
    config: dict[str, str | bool] = {
        "scenario": str(scenario),
        "set": "network.freeze=auto fleet.devices=2",
        "out": str(tmp_path / "run"),
    }
    server(grid, Context(1, 0, {}, RecordDict(), config))
    folder = RunFolder(tmp_path / "run")
    assert folder.completed
    chosen = folder.read()["scenario"]["network"]["freeze"]
    sent = {Instruction.from_record(m.content.config_records[INSTRUCTION]).scenario for m in grid.sent}
    assert {json.loads(text)["network"]["freeze"] for text in sent} == {chosen}
    analysis = folder.analysis()
    assert analysis is not None
    assert analysis["freeze"] == chosen != "auto"
