"""What a board costs: `flower-supernode`, which starts a process for each message, against `lightcl device run`.

For each way a SuperLink, two boards and `flwr run` are started on loopback, without TLS. Printed per way: memory of one
board's processes (sum of PSS, and of resident sets in parentheses) before the first message, soon after the last and
when the board has been idle for `idle_minutes`; and the seconds of a round beyond the devices' own training and testing
(median over the rounds after the first), for rounds of one message (training) and of two (training, then the test with
the shared model).

    python benchmarks/board_process.py [--toy] [--way flower|lightcl]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

CHECKOUT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
SCENARIO = """
name: board-process
network: {{weights: none, width: 4}}
stream: {{tasks: {tasks}}}
fleet: {{devices: 2, test_data: whole}}
training: {{epochs: {rounds}, batch_size: 16}}
server: {{aggregation: suffix, rounds_per_task: {rounds}}}
"""
WAYS = {"flower": "flower-supernode, a process per message", "lightcl": "lightcl device run"}
SETTLE_SECONDS = 20
IDLE_MINUTES = 1
LONGEST_SECONDS = 900


@dataclass
class Fleet:
    """A SuperLink, the boards, and `flwr run`; each a process in a session of its own."""

    folder: Path
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, program: str, *arguments: str, **more: str) -> subprocess.Popen[bytes]:
        environment = {
            **os.environ, "PYTHONPATH": str(CHECKOUT), "FLWR_HOME": str(self.folder / "flwr"), "OMP_NUM_THREADS": "1",
            "PATH": f"{BIN}:{os.environ['PATH']}", "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1",
            **more,
        }  # fmt: skip
        with (self.folder / f"{program}.log").open("ab") as log:
            process = subprocess.Popen(
                [str(BIN / program), *arguments], cwd=self.folder, env=environment, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        self.running.append(process)
        return process

    def start_board(self, way: str, number: int, server: str) -> subprocess.Popen[bytes]:
        state = self.folder / f"board-{number}"
        if way == "flower":
            node = f'partition-id={number} num-partitions=2 name="board-{number}" state-dir="{state}"'
            return self.start(
                "flower-supernode", "--insecure", "--superlink", server, "--host", "127.0.0.1", "--port",
                str(free_port()), "--node-config", node,
            )  # fmt: skip
        file = self.folder / f"board-{number}.toml"
        file.write_text(
            f'name = "board-{number}"\ndevice = {number}\ndevices = 2\nserver = "{server}"\ninsecure = true\n'
            f'state = "{state}"\nidle_minutes = {IDLE_MINUTES}\n'
        )
        return self.start("lightcl", "device", "run", "--config", str(file))

    def logs(self) -> str:
        return "\n".join(f"== {file.name}\n{file.read_text()[-2000:]}" for file in self.folder.glob("*.log"))


@contextmanager
def fleet(folder: Path) -> Iterator[Fleet]:
    started = Fleet(folder)
    try:
        yield started
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            for process in reversed(started.running):
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
            _, left = psutil.wait_procs([psutil.Process(p.pid) for p in started.running if p.poll() is None], 20)
            if not left:
                break


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait(what: str, done: Any, started: Fleet) -> None:
    deadline = time.monotonic() + LONGEST_SECONDS
    while not done():
        if time.monotonic() > deadline:
            sys.exit(f"{what}: not within {LONGEST_SECONDS} s\n{started.logs()}")
        time.sleep(0.5)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def memory(board: subprocess.Popen[bytes]) -> str:
    """MiB of a board's processes: what they share with others counts in part (PSS), or in each of them (RSS)."""
    parent = psutil.Process(board.pid)
    total = {"Pss": 0, "Rss": 0}
    for process in (parent, *parent.children(recursive=True)):
        with suppress(OSError):
            text = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
            for kind in total:
                found = re.search(rf"^{kind}:\s+(\d+)", text, re.MULTILINE)
                total[kind] += int(found[1]) if found else 0
    return f"{total['Pss'] / 1024:.0f} ({total['Rss'] / 1024:.0f})"


def beyond(run: Path) -> tuple[list[float], list[float]]:
    """Seconds beyond the slowest device's own work, of the rounds with training alone, and of those with a test."""
    devices = [json.loads(line) for line in (run / "devices.jsonl").read_text().splitlines()]
    trained: list[float] = []
    tested: list[float] = []
    for line in (run / "rounds.jsonl").read_text().splitlines()[1:]:
        row = json.loads(line)
        timings = [one["timing"] for one in devices if one["round"] == row["round"]]
        own = max(timing.get("train_seconds", 0.0) + timing.get("evaluate_seconds", 0.0) for timing in timings)
        seconds = row["timing"]["seconds"] if "timing" in row else row["seconds"]
        (tested if any("evaluate_seconds" in timing for timing in timings) else trained).append(seconds - own)
    return trained, tested


def measure(way: str, *, toy: bool) -> str:
    with tempfile.TemporaryDirectory(prefix="lightcl-board-") as name, fleet(Path(name)) as started:
        folder, port = Path(name), free_port()
        started.start(
            "flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(port),
            "--disable-runtime-dependency-installation",
        )  # fmt: skip
        wait("the SuperLink listens", lambda: listens(port), started)
        (folder / "flwr").mkdir(exist_ok=True)
        address = f'[superlink.boards]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
        (folder / "flwr" / "config.toml").write_text(address)
        boards = [started.start_board(way, number, f"127.0.0.1:{port}") for number in range(2)]
        time.sleep(SETTLE_SECONDS)
        before = memory(boards[0])
        scenario, out = folder / "scenario.yaml", folder / "run"
        scenario.write_text(SCENARIO.format(tasks=1 if toy else 2, rounds=2 if toy else 4))
        started.start(
            "flwr", "run", str(CHECKOUT), "boards", "--run-config", f'scenario="{scenario}" out="{out}"',
        )  # fmt: skip
        wait("the run ends", (out / "results.json").exists, started)
        time.sleep(SETTLE_SECONDS)
        after, idle = memory(boards[0]), "-"
        if way == "lightcl" and not toy:
            time.sleep(60 * IDLE_MINUTES)
            idle = memory(boards[0])
        trained, tested = beyond(out)
        return f"| {WAYS[way]} | {before} | {after} | {idle} | {median(trained)} | {median(tested)} |"


def median(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})" if values else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="one short run of each way, to see that it works")
    parser.add_argument("--way", choices=list(WAYS), help="measure one way only")
    arguments = parser.parse_args()
    idle = "memory, MiB: before a run | after it | after `idle_minutes`"
    print(f"| board | {idle} | round of one message, s | of two, s |")
    print("|---|---|---|---|---|---|")
    for way in [arguments.way] if arguments.way else WAYS:
        print(measure(way, toy=arguments.toy), flush=True)


if __name__ == "__main__":
    main()
