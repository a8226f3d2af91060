"""200 rounds of real boards: nothing grows, neither on the server nor on a board."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median, median_low

import psutil
import pytest

from server.link.superlink import marked
from tests.deployment.processes import LightServer, Processes, neutral, processes, rows, wait_until

__all__ = ["neutral", "processes"]  # fixtures

pytestmark = [pytest.mark.slow, pytest.mark.long]

ROUNDS = 200
SCENARIO = f"""
name: soak
network: {{weights: none, width: 8, freeze: layer4.0}}
stream: {{tasks: 5}}
fleet: {{devices: 2}}
training: {{epochs: {ROUNDS // 5}, batch_size: 32}}
server: {{aggregation: suffix, rounds_per_task: {ROUNDS // 5}}}
"""
EARLY, MIDDLE, LATE = range(60, 100), range(110, 150), range(160, ROUNDS)
"""The rounds that are compared. Before, libraries fill caches and pools of threads."""
MOST_GROWTH = 0.5
"""Of a process's own memory from each window to the next, 50 rounds later: models per round. A process that kept one
copy of a message would be above it both times; an allocator that takes one more block of memory is so once."""
POOLED = 1
"""Connections of an HTTP client's pool that may have been closed in one window and be open in the other."""


@dataclass(frozen=True)
class Sample:
    """What a process has at one moment; `memory` is its own: pages that it shares with others are not in it."""

    round: int
    descriptors: int
    threads: int
    memory: int


class Watch:
    """Looks at all processes of a server and its boards, and at their files."""

    def __init__(self, server: LightServer, started: Iterable[psutil.Process], run: Path) -> None:
        self._server, self._started, self._run = server, list(started), run
        self.samples: dict[str, list[Sample]] = defaultdict(list)
        self.files: list[tuple[int, int]] = []
        """Round, and how many files there are."""

    @property
    def round(self) -> int:
        """The rounds that are finished."""
        with suppress(OSError):
            return (self._run / "rounds.jsonl").read_bytes().count(b"\n")
        return 0

    def look(self) -> None:
        number = self.round
        for process in self._processes():
            with suppress(psutil.NoSuchProcess):
                with process.oneshot():
                    sample = Sample(number, process.num_fds(), process.num_threads(), process.memory_full_info().uss)
                    name = f"{process.pid} {' '.join(process.cmdline())[-60:]}"
                self.samples[name].append(sample)
        self.files.append((number, sum(1 for one in self._server.place.rglob("*") if one.is_file())))

    def lasting(self, rounds: range) -> dict[str, list[Sample]]:
        """The samples of these rounds, by process; without those of programs that run for a moment, as `flwr` does."""
        there = {name: [one for one in found if one.round in rounds] for name, found in self.samples.items()}
        looks = sum(number in rounds for number, _ in self.files)
        return {name: found for name, found in there.items() if len(found) > looks / 2}

    def _processes(self) -> list[psutil.Process]:
        found = [psutil.Process(pid) for pid in marked(self._server.folder) if psutil.pid_exists(pid)]
        for started in self._started:
            found += [started, *started.children(recursive=True)]
        return list(dict.fromkeys(found))


def test_nothing_grows(processes: Processes, tmp_path: Path) -> None:
    """Of descriptors and threads the usual count of each window, of files the lowest: what comes and goes within a
    round is not in it, and what is never given back is.
    """
    server, scenario, out = LightServer(processes, tmp_path, 2), tmp_path / "soak.yaml", tmp_path / "run"
    scenario.write_text(SCENARIO)
    server.change(most_requests_per_second=10_000)
    started = [server.run(str(scenario), "--out", str(out)), *(server.kit_board(number) for number in range(2))]
    watch = Watch(server, [psutil.Process(one.pid) for one in started], out)
    wait_until(lambda: watch.round >= EARLY.start, f"round {EARLY.start}", processes, 1200)
    deadline = time.monotonic() + 2400
    while watch.round < ROUNDS - 1 and not (out / "results.json").exists():
        assert time.monotonic() < deadline, processes.logs()
        watch.look()
        time.sleep(1)
    wait_until((out / "results.json").exists, "the run is complete", processes, 120)
    results = json.loads((out / "results.json").read_text())
    assert (results["rounds"], results["devices_finished"]) == (ROUNDS, 2)

    early, middle, late = (watch.lasting(window) for window in (EARLY, MIDDLE, LATE))
    model = max(row["bytes_up"] for row in rows(out))
    most = MOST_GROWTH * model * (MIDDLE.start - EARLY.start)
    assert early.keys() == middle.keys() == late.keys(), "the same processes from the first window to the last"
    for name in early:
        for what, more in (("descriptors", POOLED), ("threads", 0)):
            first, last = (median_low(getattr(one, what) for one in window[name]) for window in (early, late))
            assert last <= first + more, f"{what} of {name}: {first}, then {last}"
        memory = [median(one.memory for one in window[name]) for window in (early, middle, late)]
        growth = min(after - before for before, after in pairwise(memory))
        assert growth <= most, f"memory of {name}: {memory} bytes, {most} more are allowed each time"
    files = [min(count for number, count in watch.files if number in window) for window in (EARLY, LATE)]
    assert files[1] <= files[0], files
