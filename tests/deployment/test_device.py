"""Boards as `lightcl device run` keeps them, as real processes on loopback: they learn, are killed, and are stopped."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from client.board.status import read_status
from lightcl.storage.state import StateFolder
from tests.client.test_board import certificate
from tests.deployment.processes import (
    BIN,
    CHECKOUT,
    Processes,
    free_port,
    neutral,
    processes,
    rows,
    wait_for,
    wait_for_port,
)

__all__ = ["neutral", "processes"]  # fixtures

pytestmark = pytest.mark.slow

LIGHTCL = str(BIN / "lightcl")
TOGETHER = """
name: two-boards
network: {weights: none, width: 4}
stream: {tasks: 2}
fleet: {devices: 2, test_data: whole}
training: {epochs: 2, batch_size: 16, learning_rate: 0.05}
server: {aggregation: suffix}
"""
ALONE = """
name: two-boards
network: {weights: none, width: 4}
stream: {tasks: 2}
fleet: {devices: 2, test_data: whole}
training: {epochs: 90, batch_size: 16, learning_rate: 0.05, checkpoint_seconds: 1}
server: {aggregation: none, rounds_per_task: 3, max_failures: 9}
"""


def start_superlink(processes: Processes, tmp_path: Path) -> str:
    """Starts a SuperLink that `flwr run` knows as boards; returns its HOST:PORT."""
    port = free_port()
    processes.start(
        "superlink", "flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(port),
        "--disable-runtime-dependency-installation",
    )  # fmt: skip
    home = tmp_path / "flwr"
    home.mkdir(exist_ok=True)
    (home / "config.toml").write_text(f'[superlink.boards]\naddress = "127.0.0.1:{port}"\ninsecure = true\n')
    wait_for_port(port, processes)
    return f"127.0.0.1:{port}"


def device(processes: Processes, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [LIGHTCL, "device", *arguments], env=processes.environment, cwd=processes.folder, capture_output=True,
        text=True, timeout=120, check=False,
    )  # fmt: skip


def configure(processes: Processes, tmp_path: Path, server: str, number: int) -> Path:
    """The configuration of one of two boards, as its owner makes it."""
    file = tmp_path / f"board-{number}" / "device.toml"
    done = device(
        processes, "init", "--config", str(file), "--insecure", "--server", server, "--name", f"board-{number}",
        "--device", str(number), "--devices", "2", "--state", str(tmp_path / f"board-{number}" / "state"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return file


def scenario_file(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "two-boards.yaml"
    file.write_text(text)
    return file


def flwr_run(processes: Processes, tmp_path: Path, text: str) -> Path:
    scenario, out = scenario_file(tmp_path, text), tmp_path / "run"
    run_config = f'scenario="{scenario}" out="{out}"'
    processes.start("flwr-run", "flwr", "run", str(CHECKOUT), "boards", "--stream", "--run-config", run_config)
    return out


def simulated(processes: Processes, tmp_path: Path) -> Path:
    out = tmp_path / "simulated"
    subprocess.run(
        [LIGHTCL, "simulate", tmp_path / "two-boards.yaml", "--out", out, "--no-report"], check=True,
        env=processes.environment, cwd=tmp_path, timeout=300,
    )  # fmt: skip
    return out


def processes_of(tmp_path: Path, number: int) -> list[psutil.Process]:
    """`lightcl device run` of a board and its node."""
    mark = str(tmp_path / f"board-{number}" / "device.toml")
    found = []
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if mark in command and command[0] != "bash":
            found.append(process)
    return found


def test_two_boards_learn_what_two_simulated_devices_learn(processes: Processes, tmp_path: Path) -> None:
    server = start_superlink(processes, tmp_path)
    files = [configure(processes, tmp_path, server, number) for number in range(2)]
    doctor = device(processes, "doctor", str(scenario_file(tmp_path, TOGETHER)), "--config", str(files[0]))
    assert doctor.returncode == 0, doctor.stdout
    assert "ok     server: the server lets this board join" in doctor.stdout
    running = [
        processes.start(f"board-{number}", LIGHTCL, "device", "run", "--config", str(file))
        for number, file in enumerate(files)
    ]
    out = flwr_run(processes, tmp_path, TOGETHER)
    wait_for(out / "results.json", processes, 300)
    assert json.loads((out / "results.json").read_text())["devices_finished"] == 2
    assert rows(out) == rows(simulated(processes, tmp_path))

    status = device(processes, "status", "--config", str(files[0]), "--json")
    values = json.loads(status.stdout)
    assert (status.returncode, values["running"], values["connected"]) == (0, True, True)
    assert (values["last"]["task"], values["last"]["problem"]) == (1, None)
    assert f"connected to {server}" in device(processes, "logs", "--config", str(files[0])).stdout

    second = device(processes, "run", "--config", str(files[0]))
    assert second.returncode == 2
    assert "another `lightcl device run` uses" in second.stderr

    assert [len(processes_of(tmp_path, number)) for number in range(2)] == [2, 2]
    for process in running:
        process.send_signal(signal.SIGTERM)
        assert process.wait(40) == 0
    assert not processes_of(tmp_path, 0)
    assert not processes_of(tmp_path, 1)
    assert device(processes, "status", "--config", str(files[0])).returncode == 1


def test_a_killed_board_loses_no_finished_work(processes: Processes, tmp_path: Path) -> None:
    """kill -9 of a board's processes, or SIGTERM, at random moments of its work; a loop restarts it, as a unit does."""
    server = start_superlink(processes, tmp_path)
    for number in range(2):
        file = configure(processes, tmp_path, server, number)
        loop = f'while true; do "{LIGHTCL}" device run --config "{file}"; sleep 1; done'
        processes.start(f"board-{number}", "bash", "-c", loop)
    out = flwr_run(processes, tmp_path, ALONE)
    draw, disturbed = random.Random(0), 0
    while disturbed < 4 and wait_until_busy(tmp_path, out):
        time.sleep(draw.uniform(0, 2))
        both = processes_of(tmp_path, 0)
        ways = [(both[:1], signal.SIGTERM), (both[1:], signal.SIGKILL), (both, signal.SIGKILL)]
        whom, how = ways[disturbed % 3]
        for process in whom:
            process.send_signal(how)
        disturbed += 1
    wait_for(out / "results.json", processes, 600)
    assert disturbed >= 3, "the run ended before the board could be disturbed"
    assert json.loads((out / "results.json").read_text())["devices_finished"] == 2
    expected = simulated(processes, tmp_path)
    assert learned(out) == learned(expected)
    for number in range(2):
        assert_same_state(final_state(tmp_path / f"board-{number}" / "state"), final_state(expected, number))


def test_a_refused_key_is_tried_again(processes: Processes, tmp_path: Path) -> None:
    """With TLS and keys: the board is refused until its key is added, and for about a minute after a kill."""
    authority, key = certificate(tmp_path, datetime.now(UTC) + timedelta(days=400))
    port = free_port()
    processes.start(
        "superlink", "flower-superlink", "--ssl-ca-certfile", str(authority), "--ssl-certfile", str(authority),
        "--ssl-keyfile", str(key), "--enable-supernode-auth", "--host", "127.0.0.1", "--port", str(port),
        "--disable-runtime-dependency-installation",
    )  # fmt: skip
    wait_for_port(port, processes)
    file = tmp_path / "board-0" / "device.toml"
    made = device(
        processes, "init", "--config", str(file), "--server", f"127.0.0.1:{port}", "--name", "board-0", "--device", "0",
        "--devices", "1", "--certificate", str(authority), "--state", str(tmp_path / "board-0" / "state"),
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    doctor = device(processes, "doctor", "--config", str(file))
    assert doctor.returncode == 1
    assert "failed server: the server refused this board" in doctor.stdout
    assert "ok     tls: the server's certificate is valid until" in doctor.stdout

    running = processes.start("board-0", LIGHTCL, "device", "run", "--config", str(file))
    said(processes, file, "the server refused this board", 1)
    (tmp_path / "flwr").mkdir(exist_ok=True)
    (tmp_path / "flwr" / "config.toml").write_text(
        f'[superlink.boards]\naddress = "127.0.0.1:{port}"\nroot-certificates = "{authority}"\n'
    )
    subprocess.run(
        [BIN / "flwr", "supernode", "register", file.with_suffix(".key.pub"), "boards"], check=True,
        env=processes.environment, timeout=60,
    )  # fmt: skip
    said(processes, file, "connected to", 1)
    assert "ok     server: `lightcl device run` is running" in device(processes, "doctor", "--config", str(file)).stdout
    processes_of(tmp_path, 0)[1].send_signal(signal.SIGKILL)
    said(processes, file, "killed by signal 9", 1)
    said(processes, file, "connected to", 2)
    running.send_signal(signal.SIGTERM)
    assert running.wait(40) == 0


def said(processes: Processes, file: Path, words: str, times: int) -> None:
    """Waits until the board's log has the words so many times."""
    deadline = time.monotonic() + 200
    log = file.parent / "state" / ".board" / "log"
    while not log.exists() or log.read_text().count(words) < times:
        assert time.monotonic() < deadline, f"not in the log: {words}\n{processes.logs()}"
        time.sleep(0.2)


def wait_until_busy(tmp_path: Path, out: Path) -> bool:
    """Whether the first board trains now; False when the run ends before."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not (out / "results.json").exists():
        status = read_status(tmp_path / "board-0" / "state" / ".board")
        busy = status.get("busy") or {}  # also where the node was killed meanwhile
        if busy.get("type") == "train" and status["pid"] in [one.pid for one in processes_of(tmp_path, 0)[1:]]:
            return True
        time.sleep(0.1)
    return False


def learned(run: Path) -> dict[tuple[int, int, int], Any]:
    """What each device reported after each piece of a task, whatever the round."""
    keys = ("loss", "til", "cil")
    return {
        (row["device"], row["task"], row["epochs"]): [row.get(key) for key in keys]
        for row in rows(run)
        if not row.get("error")
    }


def final_state(folder: Path, number: int | None = None) -> dict[str, torch.Tensor]:
    pattern = "device-*" if number is None else f"device-{number:05d}"
    (found,) = [file for file in folder.rglob(pattern) if file.is_dir()]
    stored = StateFolder(found, durable=False).load()
    assert stored is not None
    return stored.tensors


def assert_same_state(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name
