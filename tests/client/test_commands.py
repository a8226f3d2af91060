"""`lightcl device check`: what a board is told before it joins."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from client.commands.check import read_node_config, run_checks
from lightcl.errors import RequestError
from tests.inprocess import small
from tests.simulations.test_command_line import lightcl


def test_a_board_that_can_join(tmp_path: Path) -> None:
    config = {"partition-id": 1, "name": "board-1", "state-dir": str(tmp_path / "state"), "accelerator": "cpu"}
    checks = {one.name: one for one in run_checks(small(), config)}
    assert list(checks) == ["node configuration", "state folder", "data", "accelerator", "network", "memory"]
    assert all(one.passed for one in checks.values()), checks
    assert checks["node configuration"].text == "board-1, device 1 of the fleet"
    # 1,797 digits, of which 20 % of each class are test images; a third of the others
    assert "training images of 8x8x1, 10 classes (4 in the fleet's streams), 2 tasks" in checks["data"].text
    assert "MB memory free" in checks["accelerator"].text
    assert re.search(r"is writable, \d+ MB free$", checks["state folder"].text)
    assert re.search(r"takes \d+ MB beside \d+ MB for Python, PyTorch and images; \d+ MB", checks["memory"].text)
    assert not list((tmp_path / "state").iterdir())


def test_a_folder_of_images_of_the_boards_own(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    for name in ("cat", "cow", "dog", "eel"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(10):
            pixels = draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{number}.png")
    config = {"data-path": str(tmp_path / "images"), "own-data": True, "state-dir": str(tmp_path / "state")}
    scenario = small(data={"source": "image-folder"})
    checks = {one.name: one for one in run_checks(scenario, config)}
    assert checks["data"].text == "32 training images of 8x8x3, 4 classes, 2 tasks"
    # A task with too few images is skipped, and the check says so; a board that learns nothing does not pass.
    fewer = small(data={"source": "image-folder"}, stream={"tasks": 2, "min_samples": 17})
    checks = {one.name: one for one in run_checks(fewer, config)}
    assert not checks["data"].passed
    assert "the board can learn no task: fewer than 17 training images" in checks["data"].text
    for number in range(10, 20):
        for name in ("cat", "cow"):
            (tmp_path / "images" / name / f"{number}.png").write_bytes(
                (tmp_path / "images" / name / f"{number - 10}.png").read_bytes()
            )
    checks = {one.name: one for one in run_checks(fewer, config)}
    assert checks["data"].text.endswith("4 classes, 1 of 2 tasks")
    (tmp_path / "images" / "cat" / "broken.png").write_bytes(b"no image")
    checks = {one.name: one for one in run_checks(scenario, config)}
    assert not checks["data"].passed
    assert "broken.png: the image does not decode" in checks["data"].text
    assert "network" not in checks


def test_each_failure_is_named_and_the_others_are_still_checked(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    config = {"partition-id": 3, "state-dir": str(tmp_path / "file" / "state")}
    checks = {one.name: one for one in run_checks(small(), config)}
    assert not checks["state folder"].passed
    assert checks["data"].text == "partition-id is 3, but fleet.devices is 3 (allowed: 0 to 2)"
    assert checks["accelerator"].passed
    (only,) = run_checks(small(), {"own-data": "yes"})
    assert not only.passed
    assert "own-data is 'yes', expected true or false" in only.text


def test_the_node_configuration_is_read_as_flower_reads_it() -> None:
    text = """partition-id=2 name="board 2" own-data=true data-path='/data'"""
    assert read_node_config(text) == {"partition-id": 2, "name": "board 2", "own-data": True, "data-path": "/data"}
    assert read_node_config("") == {}
    for wrong in ("partition-id", "name=board", "partition-id=1 name"):
        with pytest.raises(RequestError, match="--node-config"):
            read_node_config(wrong)


def test_exit_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    state = f'state-dir="{tmp_path}"'
    assert lightcl(monkeypatch, "device", "check", "quickstart", "--node-config", state, "--json") == 0
    assert [one["passed"] for one in json.loads(capfd.readouterr().out)] == [True] * 6
    assert lightcl(monkeypatch, "device", "check", "quickstart", "--node-config", f"partition-id=10 {state}") == 1
    assert "failed data: partition-id is 10" in capfd.readouterr().out
    misspelled = f"limit-temperature=70 {state}"
    assert lightcl(monkeypatch, "device", "check", "quickstart", "--node-config", misspelled) == 1
    said = capfd.readouterr().out
    assert "failed node configuration: --node-config: unknown key 'limit-temperature', did you mean" in said
    assert lightcl(monkeypatch, "device", "check", "quickstart", "--node-config", "name=x") == 2
    assert "texts need quotes" in capfd.readouterr().err
