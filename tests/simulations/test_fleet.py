"""`run_fleet`: a simulated fleet from Python."""

from __future__ import annotations

from pathlib import Path

import pytest

import lightcl
from lightcl.errors import RequestError
from lightcl.records import Results, RoundRow
from lightcl.records.folder import RunFolder
from lightcl.scenario import Scenario
from server.listeners import Listener
from simulations import run_fleet


class Rounds(Listener):
    def __init__(self) -> None:
        self.seen: list[int] = []

    def round_finished(self, row: RoundRow) -> None:
        self.seen.append(row.round)


@pytest.mark.parametrize("dropped", [{}, {1: "no answer"}])
def test_states_are_deleted_only_when_the_run_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dropped: dict[int, str]
) -> None:
    """A run with dropped devices can be resumed, which needs the states of all devices."""
    out = tmp_path / "run"

    def ended(server: object, state: Path, scenario: Scenario) -> None:
        (state / "1").mkdir(parents=True)
        finished = [{"til": {0: [0.5]}, "cil": {0: [0.5]}}]
        RunFolder(out).finish(Results.of(finished, 1, devices=2, dropped=dropped, rounds=[]))

    monkeypatch.setattr("simulations.fleet.simulate", ended)
    scenario = lightcl.load_scenario(
        {"stream": {"tasks": 1}, "fleet": {"devices": 2}, "simulation": {"workers": 1, "keep_states": "none"}}
    )
    run_fleet(scenario, out)
    assert (out / "devices").exists() == bool(dropped)


@pytest.mark.ray
def test_a_fleet_is_run_once_and_resumed_without_work(tmp_path: Path) -> None:
    scenario = lightcl.load_scenario(
        {
            "data": {"image_size": 8},
            "stream": {"tasks": 2},
            "fleet": {"devices": 2, "test_data": "whole"},
            "network": {"weights": "none", "width": 4},
            "method": {"name": "sgd"},
            "training": {"epochs": 1, "batch_size": 16},
            "simulation": {"workers": 1},
        }
    )
    rounds = Rounds()
    run = run_fleet(scenario, tmp_path / "run", listeners=[rounds])
    assert rounds.seen == [1, 2]
    assert run.scenario == scenario
    assert run.results is not None

    with lightcl.open_device(scenario, number=1) as device:  # the same numbers as the device alone
        for task in device.tasks:
            device.learn(task)
            device.evaluate()
        assert run.matrices("til")[1].values[1].tolist() == device.matrix("til").values[1].tolist()

    again = run_fleet(scenario, tmp_path / "run", resume=True, listeners=[rounds])
    assert rounds.seen == [1, 2], "the run was complete"
    assert again.devices == run.devices
    with pytest.raises(RequestError, match="holds a run"):
        run_fleet(scenario, tmp_path / "run")
