"""Real processes for tests: SuperLink, SuperNodes, `flwr run` and `lightcl server run`, all on loopback."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lightcl.exchange.join import JoinFile

CHECKOUT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def neutral(tmp_path: Path) -> dict[str, str]:
    return neutral_environment(tmp_path)


def neutral_environment(folder: Path) -> dict[str, str]:
    """An environment whose Flower files, ports and states are the test's own."""
    return {
        **os.environ,
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "FLWR_HOME": str(folder / "flwr"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(free_port()),
        "FLWR_LOCAL_CONTROL_API_PORT": str(free_port()),
        "LIGHTCL_STATE": str(folder / "state"),
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
    with ended_afterwards(Processes(neutral, tmp_path)) as started:
        yield started


@contextmanager
def ended_afterwards(started: Processes) -> Iterator[Processes]:
    """Ends what was started, the last first."""
    try:
        yield started
    finally:
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


def wait_until(true: Callable[[], bool], what: str, processes: Processes, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not in {seconds} s: {what}\n{processes.logs()}"
        time.sleep(0.2)


class LightServer:
    """`lightcl server ...` on a folder of its own; its boards, of the kit or plain SuperNodes, with its join files."""

    def __init__(self, processes: Processes, place: Path, devices: int, *options: str) -> None:
        self.processes, self.place = processes, place
        self.folder, self.port = place / "server", free_port()
        address = ("--address", "127.0.0.1", "--port", str(self.port), "--devices", str(devices))
        self.call("init", *address, *options)

    def call(self, command: str, *arguments: str, code: int = 0) -> str:
        """A command of `lightcl server`; returns its output, errors after it."""
        done = subprocess.run(
            [BIN / "lightcl", "server", command, *arguments, "--folder", str(self.folder)],
            env=self.processes.environment, cwd=self.place, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def run(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Starts `lightcl server run`, and returns when it takes requests of boards."""
        log = self.place / "server.log"
        before = log.read_text().count("the server is ready") if log.exists() else 0
        process = self.processes.start(
            "server", str(BIN / "lightcl"), "server", "run", *arguments, "--folder", str(self.folder)
        )
        ready = lambda: log.read_text().count("the server is ready") > before or process.poll() is not None  # noqa: E731
        wait_until(ready, "the server is ready", self.processes, 120)
        assert process.poll() is None, self.processes.logs()
        return process

    def change(self, **settings: int) -> None:
        """Other values in server.toml; the server does not run."""
        file = self.folder / "server.toml"
        text = file.read_text()
        for key, value in settings.items():
            text, found = re.subn(rf"(?m)^{key} = .*$", f"{key} = {value}", text)
            assert found == 1, key
        file.write_text(text)

    def set_up(self, number: int, *options: str) -> Path:
        """Sets up a board of the kit from its join file, as a person would; returns its configuration.

        `options` are more ones of `lightcl device init`.
        """
        place = self.place / f"board-{number}"
        join, config = self.folder / "join" / f"board-{number}.toml", place / "device.toml"
        subprocess.run(
            [
                BIN / "lightcl", "device", "init", "--join", join, "--config", config, "--state", place / "state",
                *options,
            ],
            env=self.processes.environment, check=True, capture_output=True, timeout=120,
        )  # fmt: skip
        return config

    def kit_board(self, number: int, *options: str) -> subprocess.Popen[bytes]:
        """Sets up a board of the kit, and starts `lightcl device run`; `options` as in `set_up`."""
        config = self.set_up(number, *options)
        return self.processes.start(f"board-{number}", str(BIN / "lightcl"), "device", "run", "--config", str(config))

    def board(self, number: int, *options: str, name: str = "", key: str | None = None) -> subprocess.Popen[bytes]:
        """Starts a SuperNode with a join file's certificate and key; `key`: another one, "" for none at all."""
        join = JoinFile.read(self.folder / "join" / f"board-{number}.toml")
        place = self.place / (name or join.name)
        place.mkdir(exist_ok=True)
        (place / "ca.crt").write_text(join.certificate)
        (place / "key").write_text(join.key if key is None else key)
        secure = [] if key == "" else ["--auth-supernode-private-key", str(place / "key")]
        config = (
            f'partition-id={join.device} num-partitions={join.devices} name="{join.name}" state-dir="{place / "state"}"'
        )
        self.processes.environment["FLWR_HOME"] = str(place / "flwr")  # one per board, as on boards
        return self.processes.start(
            name or join.name, "flower-supernode", "--superlink", join.server, "--host", "127.0.0.1",
            "--port", str(free_port()), "--node-config", config,
            *(options or ["--root-certificates", str(place / "ca.crt"), *secure]),
        )  # fmt: skip

    def states(self) -> dict[str, str]:
        """Board by board: online, offline, never seen; empty while the server does not answer."""
        done = subprocess.run(
            [BIN / "lightcl", "server", "devices", "--json", "--folder", str(self.folder)],
            env=self.processes.environment, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        return {row["name"]: row["state"] for row in json.loads(done.stdout)}


def simulated_rows(scenario: Path, processes: Processes, place: Path) -> list[dict[str, Any]]:
    """What the simulation of the same scenario writes."""
    subprocess.run(
        [BIN / "lightcl", "simulate", scenario, "--out", place, "--no-report"],
        check=True, env=processes.environment, cwd=place.parent,
    )  # fmt: skip
    return rows(place)
