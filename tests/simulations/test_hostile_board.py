"""A hostile board as a real process: what the server refuses or limits, and that the others finish."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.deployment.processes import (
    CHECKOUT,
    Processes,
    neutral,
    processes,
    start_boards,
    wait_for,
)

__all__ = ["neutral", "processes"]  # fixtures

pytestmark = pytest.mark.slow

SCENARIO = """
name: three-boards
network: {weights: none, width: 4}
stream: {tasks: 1}
fleet: {devices: 3, test_data: whole}
training: {epochs: 1, batch_size: 16}
server: {aggregation: suffix, max_failures: 5}
"""
PLUGIN = '''
"""Each training of this board is sent with other tensors; messages may come to processes of their own."""

import io
import sys
from pathlib import Path

import numpy as np
from flwr.app import Array

from lightcl.device.device import EdgeDevice

SENT = Path(__file__).with_name("sent")
honest = EdgeDevice.outgoing


def of_terabytes(array):
    """The header of 8 TB, and no data after it."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (10**12,)})
    return Array(dtype="float64", shape=(10**12,), stype="numpy.ndarray", data=header.getvalue())


def outgoing(self):
    arrays = honest(self)
    times = len(SENT.read_text()) if SENT.exists() else 0
    SENT.write_text("x" * (times + 1))
    sys.modules["client.app"].Array = of_terabytes if times == 2 else Array
    if times < 2:
        return {name: np.full(array.shape, (1e300, 1e39)[times]) for name, array in arrays.items()}
    return {name: array if "running" in name else array + np.float32(1e6) for name, array in arrays.items()}


EdgeDevice.outgoing = outgoing
'''


KILLED = '''
"""The first process of this board is killed with the greeting in its hands."""

import os
from pathlib import Path

MARK = Path(__file__).with_name("killed")
if not MARK.exists():
    MARK.touch()
    os.kill(os.getpid(), 9)
'''


def run_three_boards(processes: Processes, tmp_path: Path, scenario_text: str, plugin_text: str) -> Path:
    """Runs the scenario on three boards, of which the second has the plugin; returns the finished run's folder."""
    scenario, plugin = tmp_path / "three-boards.yaml", tmp_path / "hostile.py"
    scenario.write_text(scenario_text)
    plugin.write_text(plugin_text)
    start_boards(processes, tmp_path, 3, {1: plugin})
    out = tmp_path / "run"
    run_config = f'scenario="{scenario}" out="{out}"'
    processes.start("flwr-run", "flwr", "run", str(CHECKOUT), "boards", "--stream", "--run-config", run_config)
    wait_for(out / "results.json", processes, 1200)

    return out


def test_a_hostile_board_among_three(processes: Processes, tmp_path: Path) -> None:
    """fp64 values of 1e300, then of 1e39, then a header of 8 TB: refused. Then weights of a million: limited."""
    out = run_three_boards(processes, tmp_path, SCENARIO, PLUGIN)
    assert json.loads((out / "results.json").read_text())["devices_finished"] == 3
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    refused = [(event["device"], event["reason"]) for event in events if event["event"] == "refused"]
    assert [device for device, _ in refused] == [1, 1, 1]
    assert all("beyond 3.4e+38, the range of fp32" in reason for _, reason in refused[:2])
    assert "cannot be decoded" in refused[2][1]
    warned = [event["text"] for event in events if event["event"] == "warned"]
    assert len(warned) == 1
    assert warned[0].startswith("round 4: server.guard: device 1: its update has norm ")


def test_a_board_that_is_killed_with_its_greeting_is_asked_again(processes: Processes, tmp_path: Path) -> None:
    """The node stays the same for the server, and no reply ever comes."""
    text = SCENARIO.replace("max_failures: 5", "greeting_timeout: 30")
    out = run_three_boards(processes, tmp_path, text, KILLED)
    assert (tmp_path / "killed").exists()
    assert json.loads((out / "results.json").read_text())["devices_finished"] == 3
