"""`lightcl scenarios`, and the names of bundled scenarios wherever a command takes a SCENARIO."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightcl.errors import RequestError
from lightcl.scenario import bundled_scenarios, find_scenario, load_scenario
from simulations.commands.scenarios import header
from tests.simulations.test_command_line import lightcl

FOLDER = Path(__file__).parents[3] / "lightcl" / "scenario" / "bundled"


def test_the_header_is_read_by_fields() -> None:
    text = (
        "# One device and two tasks.\n# Command: lightcl train small\n# Cost: 3 minutes\n"
        "# Result: TIL 90 % (seed 0)\n# Note: not shown\nname: small\n# Cost: not of the header\n"
    )
    expected = {"About": "One device and two tasks.", "Cost": "3 minutes", "Result": "TIL 90 % (seed 0)"}
    assert header(text) == expected


def test_each_bundled_scenario_gives_its_purpose_cost_and_result() -> None:
    for file in FOLDER.glob("*.yaml"):
        assert list(header(file.read_text())) == ["About", "Cost", "Result"], file


def test_list_show_and_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert lightcl(monkeypatch, "scenarios", "list") == 0
    printed = capfd.readouterr().out
    for name, file in bundled_scenarios().items():
        assert f"{name}\n  {header(file.read_text())['About']}\n" in printed
    assert lightcl(monkeypatch, "scenarios", "show", "quickstart") == 0
    assert capfd.readouterr().out == (FOLDER / "quickstart.yaml").read_text()
    assert lightcl(monkeypatch, "scenarios", "copy", "quickstart", "own.yaml") == 0
    assert Path("own.yaml").read_text() == (FOLDER / "quickstart.yaml").read_text()
    Path("own.yaml").write_text("name: own\n")
    assert lightcl(monkeypatch, "scenarios", "copy", "quickstart", "own.yaml") == 2
    assert "own.yaml exists; replace it with --overwrite" in capfd.readouterr().err
    assert Path("own.yaml").read_text() == "name: own\n"
    assert lightcl(monkeypatch, "scenarios", "copy", "quickstart", "own.yaml", "--overwrite") == 0
    assert load_scenario(Path("own.yaml")).name == "quickstart"
    assert lightcl(monkeypatch, "scenarios", "copy", "quickstart", ".") == 2
    assert lightcl(monkeypatch, "scenarios", "copy", "quickstart", "nowhere/own.yaml") == 2
    assert "cannot be written to" in capfd.readouterr().err


@pytest.mark.parametrize("words", [("scenarios", "show"), ("validate",), ("train",)])
def test_an_unknown_name_is_answered_with_the_nearest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert lightcl(monkeypatch, *words, "quikstart") == 2
    said = capfd.readouterr().err
    assert "did you mean 'quickstart'?" in said
    assert f"bundled: {', '.join(bundled_scenarios())}" in said
    assert not list(tmp_path.iterdir())


def test_a_file_goes_before_a_bundled_name_and_a_folder_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("quickstart").mkdir()
    assert find_scenario(Path("quickstart")) == FOLDER / "quickstart.yaml"
    Path("quickstart").rmdir()
    Path("quickstart").write_text("name: own\n")
    assert load_scenario(Path("quickstart")).name == "own"
    with pytest.raises(RequestError, match=r"nowhere.yaml: cannot be read \(No such file or directory\)"):
        load_scenario(Path("nowhere.yaml"))
