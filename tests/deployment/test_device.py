"""Boards as `lightcl device run` keeps them, as real processes on loopback: they learn, are killed, and are stopped."""

from __future__ import annotations

import json
import os
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
    LightServer,
    Processes,
    free_port,
    neutral,
    processes,
    rows,
    wait_for,
    wait_for_port,
    wait_until,
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
TWENTY = """
name: two-boards
network: {weights: none, width: 4}
stream: {tasks: 2}
fleet: {devices: 2, test_data: whole}
training: {epochs: 30, batch_size: 16, learning_rate: 0.02}
server: {aggregation: suffix, rounds_per_task: 30}
"""
ALONE = """
name: two-boards
network: {weights: none, width: 4}
stream: {tasks: 2}
fleet: {devices: 2, test_data: whole}
training: {epochs: 90, batch_size: 16, learning_rate: 0.05, checkpoint_seconds: 1}
server: {aggregation: none, rounds_per_task: 3, max_failures: 9}
"""

INSTALLED_ON_A_BOARD = (
    "env", f"PYTHONPATH={CHECKOUT / 'tests' / 'board_installation'}:{os.environ.get('PYTHONPATH', '')}",
    "BOARD_EXTRA=scikit-learn",
)  # fmt: skip
"""Before a command: it finds only what deploy/install-board.sh installs, and the digits."""


def restarted(file: Path) -> str:
    """A shell's loop that starts the board again a second after it ended, whatever the reason: `Restart=always`."""
    return f'while true; do "{LIGHTCL}" device run --config "{file}"; sleep 1; done'


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
        processes.start(f"board-{number}", *INSTALLED_ON_A_BOARD, LIGHTCL, "device", "run", "--config", str(file))
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


def test_a_stopped_board_leaves_and_comes_back(processes: Processes, tmp_path: Path) -> None:
    """SIGTERM in the middle of a training, without keys: the server asks again, and no finished work is lost."""
    server = start_superlink(processes, tmp_path)
    for number in range(2):
        file = configure(processes, tmp_path, server, number)
        processes.start(f"board-{number}", "bash", "-c", restarted(file))
    out = flwr_run(processes, tmp_path, ALONE)
    for _ in range(2):
        assert wait_until_busy(tmp_path, out), "the run ended before the board could be stopped"
        processes_of(tmp_path, 0)[0].send_signal(signal.SIGTERM)
        time.sleep(1)
    wait_for(out / "results.json", processes, 600)
    assert json.loads((out / "results.json").read_text())["devices_finished"] == 2
    expected = simulated(processes, tmp_path)
    assert learned(out) == learned(expected)
    for number in range(2):
        assert_same_state(final_state(tmp_path / f"board-{number}" / "state"), final_state(expected, number))


def test_a_board_that_is_killed_twenty_times_learns_the_same(
    processes: Processes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """kill -9 at random moments of a run with a shared suffix, of the node or of all processes of the board; a loop
    restarts them, as a unit does. Every row is that of a simulation, where nothing was killed; but a message that was
    on its way when the board was killed is sent again, which costs bytes."""
    server, out = LightServer(processes, tmp_path, 2), tmp_path / "run"
    running = server.run()
    for number in range(2):
        processes.start(f"board-{number}", "bash", "-c", restarted(server.set_up(number)))
    server.call("start", str(scenario_file(tmp_path, TWENTY)), "--out", str(out))
    draw, kills = random.Random(0), []
    while len(kills) < 20:
        done = len(rounds(out))
        wait_until(lambda: len(rounds(out)) > done, "a round after the last kill", processes, 200)  # noqa: B023
        time.sleep(draw.uniform(0, 3))
        whom = processes_of(tmp_path, 0)[len(kills) % 2 :]
        for process in whom:
            process.send_signal(signal.SIGKILL)
        kills.append(time.time())
        for process in whom:
            process.wait(10)
        assert not (out / "results.json").exists(), "the run ended before the board was killed twenty times"
    wait_for(out / "results.json", processes, 600)
    assert without_bytes(out) == without_bytes(simulated(processes, tmp_path))
    for number in range(2):
        state = tmp_path / f"board-{number}" / "state"
        assert_same_state(final_state(state), final_state(tmp_path / "simulated", number))
    waits = [min(end for end in rounds(out) if end > kill) - kill for kill in kills]
    with capsys.disabled():
        print(f"\nfrom a kill to the end of its round: {sorted(round(wait, 1) for wait in waits)} s")  # noqa: T201
    assert running.poll() is None


def test_an_idle_board_gives_its_memory_back(processes: Processes, tmp_path: Path) -> None:
    """PyTorch is unloaded after `idle_minutes`, and the board is the same node as before, in the same process."""
    server, out = LightServer(processes, tmp_path, 1), tmp_path / "run"
    server.run()
    file = server.set_up(0)
    file.write_text(file.read_text().replace("idle_minutes = 10", "idle_minutes = 0.1"))
    processes.start("board-0", LIGHTCL, "device", "run", "--config", str(file))
    text = TOGETHER.replace("devices: 2", "devices: 1").replace("aggregation: suffix", "aggregation: none")
    server.call("start", str(scenario_file(tmp_path, text)), "--out", str(out))
    wait_for(out / "results.json", processes, 300)
    node = processes_of(tmp_path, 0)[1]
    loaded = node.memory_full_info().pss
    said(processes, file, "the memory of PyTorch and of the images is given back", 1)
    said(processes, file, "connected to", 2)
    assert [one.pid for one in processes_of(tmp_path, 0)][1] == node.pid
    assert node.memory_full_info().pss < loaded / 2
    assert server.states() == {"board-0": "online"}
    again = tmp_path / "again"
    server.call("start", str(tmp_path / "two-boards.yaml"), "--out", str(again))
    wait_for(again / "results.json", processes, 300)
    assert rows(again) == rows(out)


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


def without_bytes(run: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "bytes_down"} for row in rows(run)]


def rounds(out: Path) -> list[float]:
    """When the rounds of a run ended, in seconds since 1970."""
    file = out / "events.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return [datetime.fromisoformat(event["time"]).timestamp() for event in found if event["event"] == "round_finished"]


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
