"""What devices want their user to know reaches the console and the events, once per run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message

from lightcl.records import Run, load_run
from lightcl.records.folder import EVENTS, RunFolder
from lightcl.scenario import Scenario
from lightcl.storage.prefix_cache import CacheFull, FeatureStore
from server.rounds import Coordinator
from tests.inprocess import InProcessGrid, Silent, small

QUICK: dict[str, Any] = {"fleet": {"devices": 2, "test_data": "whole"}, "training": {"epochs": 2, "batch_size": 16}}


def run_on(folder: Path, grid: InProcessGrid, scenario: Scenario) -> tuple[Run, list[str]]:
    """The run, and the warnings in its events."""
    target = RunFolder(folder)
    target.begin(scenario, {"run": "r"}, [])
    Coordinator(scenario, target, "r", Silent()).run(grid)
    events = [json.loads(line) for line in (folder / EVENTS).read_text().splitlines()]
    return load_run(folder), [event["text"] for event in events if event["event"] == "warned"]


def test_a_cache_that_is_off_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A warning in a worker of a simulation, or on a board, reaches nobody."""
    monkeypatch.setenv("LIGHTCL_CACHE", str(tmp_path / "cache"))

    def full(*_: object) -> None:
        raise CacheFull("no room for 5 bytes")

    monkeypatch.setattr(FeatureStore, "write", full)
    scenario = small(
        **QUICK, data={"views": 1}, method={"name": "sgd"}, network={"freeze": "layer2", "weights": "none", "width": 4}
    )
    with pytest.warns(RuntimeWarning, match="the prefix cache is off"):
        run, warned = run_on(tmp_path / "run", InProcessGrid(tmp_path / "s", 2), scenario)
    assert run.results is not None
    assert run.results.devices_finished == 2
    assert len(warned) == 1
    assert "the prefix cache is off from here on: no room for 5 bytes" in warned[0]


@pytest.mark.parametrize("notice", [{"text": "a\nb\x1b[2J" + "c" * 10**6}, {"text": 5}, {"other": "x"}])
def test_a_notice_is_cut_to_a_line_and_garbage_is_ignored(tmp_path: Path, notice: dict[str, Any]) -> None:
    def tamper(message: Message, reply: Message) -> Message:
        reply.content["notice"] = ConfigRecord(notice)
        return reply

    run, warned = run_on(tmp_path / "run", InProcessGrid(tmp_path / "s", 2, tamper), small(**QUICK))
    assert run.results is not None
    assert run.results.devices_finished == 2
    assert len(warned) == (1 if "c" in str(notice) else 0)
    assert all(text.isprintable() and len(text) < 400 for text in warned)
