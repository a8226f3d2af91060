"""A board that is too hot, as a real process: its back-off and its telemetry pass through Flower's SuperLink."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tests.deployment.processes import CHECKOUT, Processes, neutral, processes, start_boards, wait_for
from tests.lightcl.device.boards import orin

__all__ = ["neutral", "processes"]  # fixtures

pytestmark = pytest.mark.slow

SCENARIO = """
name: two-boards
network: {weights: none, width: 4}
stream: {tasks: 1}
fleet: {devices: 2, test_data: whole}
training: {epochs: 1, batch_size: 16}
"""
PLUGIN = '''
"""This board has a limit, and its sensors are files in the folder beside this one."""

from pathlib import Path

from lightcl.device.metering import Board, Limits
from lightcl.device.telemetry import Sensors

ROOT = Path(__file__).with_name("root")
real = Board.__init__
Board.__init__ = lambda self, folder, sensors, limits: real(self, folder, Sensors(ROOT), Limits(85.0))
'''


def test_a_hot_board_is_asked_again_and_finishes(processes: Processes, tmp_path: Path) -> None:
    (tmp_path / "sensors.py").write_text(PLUGIN)
    board = orin(tmp_path / "root")
    board.zone(1, "gpu-thermal", 90_000)
    # The board wants a minute; the server gives it 10 seconds.
    (tmp_path / "two-boards.yaml").write_text(SCENARIO + "server: {longest_back_off: 10}\n")
    start_boards(processes, tmp_path, 2, {1: tmp_path / "sensors.py"})
    out = tmp_path / "run"
    run_config = f'scenario="{tmp_path / "two-boards.yaml"}" out="{out}"'
    processes.start("flwr-run", "flwr", "run", str(CHECKOUT), "boards", "--stream", "--run-config", run_config)
    wait_for(out / "events.jsonl", processes, 300)
    deadline = time.monotonic() + 300
    while "backed_off" not in (out / "events.jsonl").read_text():
        assert time.monotonic() < deadline, processes.logs()
        time.sleep(0.2)
    board.zone(1, "gpu-thermal", 40_000)
    wait_for(out / "results.json", processes, 300)
    rows = [json.loads(line) for line in (out / "devices.jsonl").read_text().splitlines()]
    assert [row.get("error") for row in rows] == [None, None]
    timing = rows[1]["timing"]
    assert (timing["backed_off_seconds"], timing["power_source"]) == (10.0, "VDD_IN")
    assert timing["backed_off_reason"] == "gpu-thermal has 90.0 °C, at most 85"
    assert timing["temperature_c"] == 48.218
