"""The same app as real processes on loopback: one SuperLink, two SuperNodes, `flwr run`."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

CHECKOUT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
SCENARIO = """
name: two-boards
network: {weights: none, width: 4}
stream: {tasks: 2}
fleet: {devices: 2, test_data: whole}
training: {epochs: 2, batch_size: 16, learning_rate: 0.05}
server: {aggregation: suffix}
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def neutral(tmp_path: Path) -> dict[str, str]:
    """An environment whose Flower files, ports and states are the test's own."""
    return {
        **os.environ,
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "FLWR_HOME": str(tmp_path / "flwr"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(free_port()),
        "FLWR_LOCAL_CONTROL_API_PORT": str(free_port()),
        "LIGHTCL_STATE": str(tmp_path / "state"),
        "OMP_NUM_THREADS": "1",
    }


class Processes:
    """Started programs, each in a session of its own, ended with everything they started."""

    def __init__(self, environment: dict[str, str], folder: Path) -> None:
        self.environment, self.folder = environment, folder
        self.running: list[subprocess.Popen[bytes]] = []

    def start(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        log = (self.folder / f"{name}.log").open("ab")
        process = subprocess.Popen(
            command, cwd=self.folder, env=self.environment, stdout=log, stderr=log, start_new_session=True
        )
        self.running.append(process)
        return process

    def stop(self, process: subprocess.Popen[bytes], sig: int = 15) -> None:
        if process.poll() is None:
            os.killpg(process.pid, sig)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
                process.wait()

    def logs(self) -> str:
        return "\n".join(f"== {f.name}\n{f.read_text()[-3000:]}" for f in sorted(self.folder.glob("*.log")))


@pytest.fixture
def processes(neutral: dict[str, str], tmp_path: Path) -> Iterator[Processes]:
    started = Processes(neutral, tmp_path)
    yield started
    for process in reversed(started.running):
        started.stop(process)


def rows(run: Path) -> list[dict[str, Any]]:
    file = run / "devices.jsonl"
    kept = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [{k: v for k, v in row.items() if k not in ("timing", "name")} for row in kept]


def wait_for(file: Path, processes: Processes, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not file.exists():
        assert time.monotonic() < deadline, f"{file.name} did not appear in {seconds} s\n{processes.logs()}"
        time.sleep(0.5)


def wait_for_port(port: int, processes: Processes) -> None:
    """`flwr run` gives up at once where the SuperLink does not listen so far."""
    for _ in range(600):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.5)
    raise AssertionError(processes.logs())


def start_boards(processes: Processes, tmp_path: Path, boards: int, plugins: dict[int, Path] | None = None) -> None:
    """Starts a SuperLink, which `flwr run` knows as boards, and a SuperNode per board."""
    port = free_port()
    processes.start(
        "superlink", "flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(port),
        "--disable-runtime-dependency-installation",
    )  # fmt: skip
    for number in range(boards):
        config = (
            f'partition-id={number} num-partitions={boards} name="board-{number}" state-dir="{tmp_path}/board-{number}"'
        )
        if plugins and number in plugins:
            processes.environment["LIGHTCL_PLUGINS"] = str(plugins[number])
        processes.start(
            f"supernode-{number}", "flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{port}",
            "--host", "127.0.0.1", "--port", str(free_port()), "--node-config", config,
        )  # fmt: skip
        processes.environment.pop("LIGHTCL_PLUGINS", None)
    home = tmp_path / "flwr"
    home.mkdir(exist_ok=True)
    (home / "config.toml").write_text(f'[superlink.boards]\naddress = "127.0.0.1:{port}"\ninsecure = true\n')
    wait_for_port(port, processes)


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
