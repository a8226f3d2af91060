"""The same app as real processes on loopback: one SuperLink, two SuperNodes, `flwr run`."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.deployment.processes import (
    BIN,
    CHECKOUT,
    Processes,
    neutral,
    processes,
    rows,
    start_boards,
    wait_for,
)

__all__ = ["neutral", "processes"]  # fixtures

pytestmark = pytest.mark.slow

SCENARIO = """
name: two-boards
network: {weights: none, width: 4}
stream: {tasks: 2}
fleet: {devices: 2, test_data: whole}
training: {epochs: 2, batch_size: 16, learning_rate: 0.05}
server: {aggregation: suffix}
"""


def test_two_supernodes_learn_what_two_simulated_devices_learn(processes: Processes, tmp_path: Path) -> None:
    scenario = tmp_path / "two-boards.yaml"
    scenario.write_text(SCENARIO)
    start_boards(processes, tmp_path, 2)
    out = tmp_path / "run"
    run_config = f'scenario="{scenario}" out="{out}"'
    processes.start("flwr-run", "flwr", "run", str(CHECKOUT), "boards", "--stream", "--run-config", run_config)
    wait_for(out / "results.json", processes, 300)

    results = json.loads((out / "results.json").read_text())
    assert results["devices_finished"] == 2
    assert {json.loads(line)["name"] for line in (out / "devices.jsonl").read_text().splitlines()} == {
        "board-0",
        "board-1",
    }
    assert list((tmp_path / "board-0").rglob("state.json")), "the state lies where the node's configuration says"
    simulated = tmp_path / "simulated"
    subprocess.run(
        [BIN / "lightcl", "simulate", scenario, "--out", simulated], check=True, env=processes.environment, cwd=tmp_path
    )
    assert rows(out) == rows(simulated)


def test_flwr_run_runs_the_quickstart(processes: Processes, tmp_path: Path) -> None:
    """`flwr run .` with Flower's own defaults (two simulated nodes) and the app's default scenario."""
    out = tmp_path / "run"
    processes.start("flwr-run", "flwr", "run", str(CHECKOUT), "--stream", "--run-config", f'out="{out}"')
    try:
        wait_for(out / "results.json", processes, 400)
    finally:
        for line in subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, text=True).stdout.split():
            subprocess.run(["kill", line], check=False)
    results = json.loads((out / "results.json").read_text())
    assert results["devices_finished"] == 10
