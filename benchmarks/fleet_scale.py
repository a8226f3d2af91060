"""A fleet as `lightcl simulate` runs it: start, cost per device-round by size of the fleet, efficiency and memory.

    python benchmarks/fleet_scale.py [--devices 100 1000 10000] [--per-round 10] [--rounds 10] [--repeats 3] [--toy]
    python benchmarks/fleet_scale.py SCENARIO [--set KEY=VALUE ...] --rounds 30

Without a scenario: fleets of several sizes whose devices all do the same work. Each holds `--images` noise images of
32x32 pixels, trains five epochs of one task on them with the built-in network (width 20, bf16, a shared suffix) and is
tested; no device takes part twice. The sizes take turns, each run is a process of its own, and the first two rounds,
in which workers start and PyTorch warms up, do not count. `start` is from the command until the first round.

With a scenario, a bundled one or a file: its first `--rounds` rounds, with the memory after each of ten parts of them.

The cost of a device-round is wall time between the ends of rounds over the devices of a round, so it includes all that
the server does; and the processor time of all processes of the run, which depends less on what else the machine does.
`efficiency` is the devices' own seconds of training and testing over wall time and workers. Memory is
that of driver and workers: the proportional set size, which counts a page that several processes share once, and the
resident sets, which count it in each. Ray's own processes (raylet, GCS, agents) are counted apart.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

from lightcl.data.sources import load_source
from lightcl.errors import Stopped
from lightcl.records.rows import RoundRow
from lightcl.scenario import Scenario, load_scenario
from server.listeners import Listener

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}
WARM_UP = 2
"""First rounds that do not count."""
MIB = 2**20


@dataclass
class Memory:
    """MiB at the end of a round; `pss` of driver and workers together."""

    pss: float
    driver_pss: float
    driver_rss: float
    workers_pss: list[float]
    workers_rss: list[float]
    ray_pss: float
    """Ray's own processes, and its workers that have no job."""


@dataclass
class Measured:
    """One run, as its process reports it. `ends` are the wall-clock seconds between the ends of rounds."""

    start: float
    ends: list[float] = field(default_factory=list)
    messages: list[int] = field(default_factory=list)
    """Devices per round."""
    failed: int = 0
    processor: list[float] = field(default_factory=list)
    """Processor seconds between the ends of rounds, of driver, workers and Ray together."""
    device_seconds: list[float] = field(default_factory=list)
    """Training and testing on all devices of a round."""
    memory: list[Memory] = field(default_factory=list)
    workers: int = 0
    load: float = 0.0
    """Runnable processes of the whole machine, mean of the last minute."""

    @classmethod
    def from_json(cls, text: str) -> Measured:
        values = json.loads(text)
        return cls(**values | {"memory": [Memory(**memory) for memory in values["memory"]]})

    def per_device_round(self) -> float:
        """Median seconds of wall time."""
        pairs = zip(self.ends[WARM_UP:], self.messages[WARM_UP:], strict=True)
        return median(seconds / count for seconds, count in pairs)

    def processor_per_device_round(self) -> float:
        """Median seconds of processor time."""
        pairs = zip(self.processor[WARM_UP:], self.messages[WARM_UP:], strict=True)
        return median(seconds / count for seconds, count in pairs)

    def efficiency(self) -> float:
        return sum(self.device_seconds[WARM_UP:]) / self.workers / sum(self.ends[WARM_UP:])


class Watch(Listener):
    """Notes the time and the memory after every round, and ends the run after `rounds` of them."""

    def __init__(self, begun: float, rounds: int, stop: Any) -> None:
        self.found, self._begun, self._rounds, self._stop = Measured(0.0), begun, rounds, stop
        self._last, self._processor = 0.0, 0.0

    def round_started(self, number: int, rounds_left: int, devices: int) -> None:
        if not self._last:
            self.found.start = time.time() - self._begun
            self._last, self._processor = time.perf_counter(), processor_seconds()

    def round_finished(self, row: RoundRow) -> None:
        self.found.ends.append(time.perf_counter() - self._last)
        self.found.processor.append(processor_seconds() - self._processor)
        self.found.messages.append(row.devices)
        self.found.failed += row.failed
        self.found.memory.append(memory_now())
        print(
            f"round {len(self.found.ends)}: {self.found.ends[-1]:.1f} s, {self.found.memory[-1].pss:.0f} MiB",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        if len(self.found.ends) == self._rounds:
            self._stop.set()
        self._last, self._processor = time.perf_counter(), processor_seconds()  # looking at the memory does not count


def processor_seconds() -> float:
    """Processor time so far of this process and all below it."""
    total = 0.0
    driver = psutil.Process()
    for process in (driver, *driver.children(recursive=True)):
        with suppress(psutil.Error):  # it has just ended
            times = process.cpu_times()
            total += times.user + times.system
    return total


def memory_now() -> Memory:
    """Of this process, which is the driver, and of its Ray's processes."""

    def sizes(process: psutil.Process) -> tuple[float, float]:
        try:
            found = process.memory_full_info()
        except psutil.Error:  # it has just ended
            return 0.0, 0.0
        return found.pss / MIB, found.rss / MIB

    driver = psutil.Process()
    workers, others = [], []
    for process in driver.children(recursive=True):
        try:
            name = " ".join(process.cmdline())
        except psutil.Error:
            continue
        (workers if "DeviceWorker" in name or "ClientAppActor" in name else others).append(process)
    driver_pss, driver_rss = sizes(driver)
    of_workers = [sizes(process) for process in workers]
    pss = [pss for pss, _ in of_workers]
    ray = sum(sizes(process)[0] for process in others)
    return Memory(sum(pss) + driver_pss, driver_pss, driver_rss, pss, [rss for _, rss in of_workers], ray)


def measure(scenario: Scenario, rounds: int, begun: float, out: Path) -> Measured:
    """Runs the first rounds of a scenario in this process; `begun` is the time of day at which the command began."""
    from lightcl.preparation import open_run
    from lightcl.records.folder import RunFolder
    from server.app import make_app
    from server.rounds import Coordinator
    from simulations.runtime import simulate

    folder = RunFolder(out)
    prepared = open_run(folder, scenario, "benchmark", "fleet", resume=False, overwrite=False)
    with folder.locked():
        watch = Watch(begun, rounds, None)
        run_id = str(folder.read()["run"])
        coordinator = Coordinator(prepared.scenario, folder, run_id, watch, prepared.tasks, durable=False)
        watch._stop = coordinator.stop
        try:
            simulate(make_app(coordinator), folder.path / "devices", prepared.scenario)
        except Stopped:
            pass
        finally:
            coordinator.stop.set()
    found = watch.found
    found.workers, found.load = scenario.simulation.workers, os.getloadavg()[0]
    seconds = dict.fromkeys(range(1, len(found.ends) + 1), 0.0)
    for row in folder.devices():
        if row.round in seconds:
            seconds[row.round] += (row.train_seconds or 0.0) + (row.evaluate_seconds or 0.0)
    found.device_seconds = list(seconds.values())
    return found


def in_a_process(scenario: str, changes: list[str], rounds: int, *, show: bool = False) -> Measured:
    """`measure` in a process of its own, which leaves nothing behind. `scenario` is a bundled one's name or a file.

    `show`: each round is printed to standard error when it is over.
    """
    words = ["--child", json.dumps([time.time(), scenario, changes, rounds])]
    done = subprocess.run(
        [sys.executable, __file__, *words],
        stdout=subprocess.PIPE, stderr=None if show else subprocess.PIPE, text=True, check=False,
        env=os.environ | ENVIRONMENT,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stdout + (done.stderr or ""))
    return Measured.from_json(done.stdout.splitlines()[-1])


def child(begun: float, scenario: str, changes: list[str], rounds: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = measure(load_scenario(Path(scenario), changes), rounds, begun, Path(folder, "run"))
    print(json.dumps(asdict(found)), flush=True)
    os._exit(0)


# -- fleets of several sizes ---------------------------------------------------------------------------------------


def write_noise(folder: Path, train: int, side: int, test: int = 200) -> None:
    """Images of two classes in the form that `data.source: parquet` reads."""
    from datasets import ClassLabel, Dataset, Features, Image

    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    draw = np.random.default_rng(0)
    for split, count in (("train", train), ("test", test)):
        content = {
            "image": list(draw.integers(0, 256, (count, side, side, 3), dtype=np.uint8)),
            "label": [number % 2 for number in range(count)],
        }
        Dataset.from_dict(content, features).to_parquet(folder / f"{split}.parquet")


def changes_for(devices: int, images: Path, chosen: argparse.Namespace) -> list[str]:
    """The sizes differ in nothing but the number of devices, and of images in the same proportion."""
    return [
        "data.source=parquet", f"data.path={images}", "data.augmentation=crop-flip", f"data.views={chosen.views}",
        "stream.tasks=1", "stream.classes_per_task=2",
        f"fleet.devices={devices}", "fleet.partition=iid", "fleet.test_data=matched", "fleet.test_images=20",
        f"training.epochs={chosen.epochs}", "training.batch_size=8",
        f"server.fraction={min(1.0, chosen.per_round / devices)}", "server.aggregation=suffix",
        "device.accelerator=cpu", f"device.precision={chosen.precision}", f"simulation.workers={chosen.workers}",
        "simulation.keep_states=none",
    ] + (["network.weights=none", "network.width=4"] if chosen.toy else [])  # fmt: skip


def compare_sizes(chosen: argparse.Namespace) -> None:
    runs: dict[int, list[Measured]] = {devices: [] for devices in chosen.devices}
    with tempfile.TemporaryDirectory() as folder:
        for devices in runs:
            images = Path(folder, str(devices))
            images.mkdir()
            write_noise(images, chosen.images * devices, 8 if chosen.toy else 32)
            load_source(load_scenario("quickstart", changes_for(devices, images, chosen)).source_request())  # decodes
        for _ in range(chosen.repeats):
            for devices in runs:
                changes = changes_for(devices, Path(folder, str(devices)), chosen)
                runs[devices].append(in_a_process("quickstart", changes, chosen.rounds))
    print(
        f"\n{chosen.per_round} devices per round, {chosen.images} images and {chosen.epochs} epochs per device, "
        f"{chosen.precision}, {chosen.workers} workers, median of {chosen.repeats} runs\n"
    )
    print(
        "| devices | start | ms per device-round | ratio, lowest and highest | processor ms "
        "| ratio, lowest and highest | efficiency | driver + workers, PSS | RSS | Ray itself, PSS | load |\n"
        "|---|---|---|---|---|---|---|---|---|---|---|"
    )
    for devices, measured in runs.items():
        memory = [run.memory[-1] for run in measured]
        print(
            f"| {devices} | {median(run.start for run in measured):.1f} s "
            f"| {_with_ratio(runs, devices, Measured.per_device_round)} "
            f"| {_with_ratio(runs, devices, Measured.processor_per_device_round)} "
            f"| {median(run.efficiency() for run in measured):.2f} "
            f"| {median(m.pss for m in memory):.0f} MiB "
            f"| {median(m.driver_rss + sum(m.workers_rss) for m in memory):.0f} MiB "
            f"| {median(m.ray_pss for m in memory):.0f} MiB | {median(run.load for run in measured):.1f} |"
        )


def _with_ratio(runs: dict[int, list[Measured]], devices: int, seconds: Callable[[Measured], float]) -> str:
    """Two cells: milliseconds, and their ratio to those of the first size in the same turn."""
    own, first = ([seconds(run) for run in measured] for measured in (runs[devices], next(iter(runs.values()))))
    ratios = [one / base for one, base in zip(own, first, strict=True)]
    return f"{1000 * median(own):.0f} | {median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}"


# -- a scenario ----------------------------------------------------------------------------------------------------


def show_scenario(chosen: argparse.Namespace) -> None:
    changes = list(chosen.set)
    load_source(load_scenario(Path(chosen.scenario), changes).source_request())  # decoded before the start
    found = in_a_process(chosen.scenario, changes, chosen.rounds, show=True)
    rate = 1 / found.per_device_round()
    print(
        f"\n{chosen.scenario} {' '.join(changes)}\n{len(found.ends)} rounds of {found.messages[-1]} devices, "
        f"{found.failed} failed; start {found.start:.1f} s; {rate:.1f} device-rounds per second, "
        f"{1000 * found.processor_per_device_round():.0f} ms of processor time each; efficiency "
        f"{found.efficiency():.2f} on {found.workers} workers; load {found.load:.1f}\n"
    )
    print(
        "| round | seconds | devices' seconds | driver + workers, PSS | driver, PSS (RSS) | workers, PSS (RSS) "
        "| Ray itself, PSS |\n|---|---|---|---|---|---|---|"
    )
    total = len(found.ends)
    for index in sorted({0, *(round(total * part / 10) - 1 for part in range(1, 11))} & set(range(total))):
        m = found.memory[index]
        workers = ", ".join(f"{p:.0f} ({r:.0f})" for p, r in zip(m.workers_pss, m.workers_rss, strict=True))
        print(
            f"| {index + 1} | {found.ends[index]:.1f} | {found.device_seconds[index]:.1f} | {m.pss:.0f} MiB "
            f"| {m.driver_pss:.0f} ({m.driver_rss:.0f}) | {workers} | {m.ray_pss:.0f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenario", nargs="?", help="a bundled scenario's name or a file; default: several sizes")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE")
    parser.add_argument("--devices", type=int, nargs="+", default=[100, 1_000, 10_000])
    parser.add_argument("--images", type=int, default=10, help="per device")
    parser.add_argument("--per-round", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--views", type=int, default=0)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--toy", action="store_true", help="two small fleets, for a smoke test")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.child:
        child(*json.loads(chosen.child))
    if chosen.toy:
        chosen.devices, chosen.per_round, chosen.rounds, chosen.repeats, chosen.workers = [6, 12], 2, 3, 1, 1
    with tempfile.TemporaryDirectory() as cache:
        os.environ.setdefault("LIGHTCL_CACHE", cache)
        if chosen.scenario:
            show_scenario(chosen)
        else:
            compare_sizes(chosen)


if __name__ == "__main__":
    main()
