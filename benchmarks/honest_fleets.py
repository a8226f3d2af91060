"""Fleets without any hostile device: what the guard says about them, and the time that it takes.

    python -m benchmarks.honest_fleets --seeds 3
    python -m benchmarks.honest_fleets --fleets cifar10 --path FOLDER --seeds 3

Server and devices are real, in one process, so devices train one after the other. "largest update" is the longest
update of a round as a share of its limit: the guard acts above 1. "least in common" is r of that update which has least
in common with the one most like it (server/aggregation/guard.py), from three devices on: the guard takes it for noise
below 2.5. Times are CPU times; the share is of all rounds.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightcl.preparation import prepare
from lightcl.records.folder import RunFolder
from lightcl.scenario import Scenario
from server.aggregation.guard import FACTOR, FACTOR_OF_FEW, Directions, UpdateGuard
from server.aggregation.robust import FEW
from server.aggregation.statistics import ClassSums
from server.ledger import KnownImages
from server.listeners import Listener
from server.rounds import Coordinator
from tests.inprocess import InProcessGrid

DIGITS: dict[str, Any] = {
    "data": {"source": "digits", "image_size": 16},
    "stream": {"tasks": 3},
    "network": {"weights": "builtin"},
    "training": {"epochs": 2, "batch_size": 8, "learning_rate": 0.01},
}
SKEWED = {"fleet": {"devices": 10, "partition": "dirichlet", "alpha": 0.1, "test_data": "matched"}}
HEADS = {"aggregation": "suffix+head", "rounds_per_task": 2}
THREE = DIGITS | {"fleet": {"devices": 3, "test_data": "whole"}, "server": HEADS}
FOUR_CLASSES = {"partition": "pathological", "classes_per_device": 4}
CIFAR10: dict[str, Any] = {  # as the bundled cifar10-10-devices, with fewer epochs
    "data": {"source": "cifar10"},
    "stream": {"tasks": 5},
    "fleet": {"devices": 10},
    "network": {"weights": "builtin"},
    "training": {"epochs": 1, "batch_size": 32, "learning_rate": 0.01},
    "server": {"aggregation": "suffix+head"},
    "device": {"precision": "bf16"},
}
FLEETS: dict[str, dict[str, Any]] = {
    "iid": DIGITS | {"fleet": {"devices": 10, "test_data": "whole"}, "server": HEADS},
    "dirichlet": DIGITS | SKEWED | {"server": HEADS},
    "dirichlet, FedAdam": DIGITS | SKEWED | {"server": HEADS | {"strategy": "FedAdam"}},
    "dirichlet, FedAdam 0.01": DIGITS
    | SKEWED
    | {"server": HEADS | {"strategy": "FedAdam", "strategy_options": {"eta": 0.01}}},
    "dirichlet, class sums": DIGITS
    | SKEWED
    | {"server": HEADS, "method": {"name": "lightcl-plus", "share_statistics": True}},
    "three, own order": THREE | {"stream": {"tasks": 5, "class_order": "shuffled", "per_device_order": True}},
    "three, own classes": THREE | {"stream": {"tasks": 2, "cut": "own"}, "fleet": THREE["fleet"] | FOUR_CLASSES},
    "cifar10": CIFAR10,
}
TOY = {"data": {"source": "digits"}, "network": {"weights": "none", "width": 4}, "training": {"epochs": 2}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fleets", nargs="+", choices=list(FLEETS), default=[f for f in FLEETS if f != "cifar10"])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--path", type=Path, help="cifar10: a folder with its parquet files")
    parser.add_argument("--tasks", type=int, help="of the stream")
    parser.add_argument("--toy", action="store_true", help="one tiny fleet; the figures mean nothing")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    titles = ["fleet", "seed", "rounds", "finished", "limited", "refused", "largest update", "least in common"]
    titles += ["guard per device-round", "share"]
    print(f"| {' | '.join(titles)} |")
    print(f"|{'---|' * len(titles)}")
    for name in ["dirichlet"] if chosen.toy else chosen.fleets:
        for seed in range(chosen.seeds):
            values = FLEETS[name] | (TOY if chosen.toy else {}) | {"seed": seed}
            if chosen.path and name == "cifar10":
                values["data"] = {"source": "parquet", "path": str(chosen.path)}
            if chosen.tasks:
                values["stream"] = {"tasks": chosen.tasks}
            print(f"| {name} | {seed} | {measure(Scenario.model_validate(values, strict=False))} |", flush=True)


class Watch(Listener):
    """Counts what the guard does."""

    def __init__(self) -> None:
        self.limited: list[str] = []
        self.refusals: list[str] = []

    def warned(self, text: str) -> None:
        self.limited.append(text)

    def refused(self, device: int, reason: str) -> None:
        self.refusals.append(reason)


def measure(scenario: Scenario) -> str:
    """One run, as the rest of its row."""
    prepared, watch, clock = prepare(scenario), Watch(), Clock()
    with tempfile.TemporaryDirectory() as temporary, clock:
        folder = RunFolder(Path(temporary) / "run")
        folder.begin(scenario, {"run": "r"}, [])
        coordinator = Coordinator(
            scenario, folder, "r", watch, prepared.tasks, images=KnownImages.of(prepared), durable=False
        )
        start = time.process_time()
        results = coordinator.run(InProcessGrid(Path(temporary) / "states", scenario.fleet.devices))
        total = time.process_time() - start
        device_rounds = sum(row.devices for row in folder.rounds())
    finished = f"{results.devices_finished} of {results.devices - results.without_tasks}"
    each = 1000 * clock.seconds / device_rounds
    cells = [
        results.rounds,
        finished,
        len(watch.limited),
        len(watch.refusals),
        f"{clock.largest:.2f}",
        f"{clock.least:.1f}",
        f"{each:.1f} ms",
    ]
    return " | ".join(map(str, [*cells, f"{clock.seconds / total:.2%}"]))


class Clock:
    """While it is entered, the seconds that the guard takes, the largest update as a share of its limit, and the least
    that an update has in common with the one most like it."""

    TIMED: tuple[tuple[type, str], ...] = (
        (UpdateGuard, "bound_examples"), (UpdateGuard, "check"), (ClassSums, "unlike_the_fleet"),
    )  # fmt: skip

    def __init__(self) -> None:
        self.seconds = self.largest = 0.0
        self.least = float("inf")
        self._originals: list[tuple[type, str, Callable[..., Any]]] = []

    def __enter__(self) -> None:
        for kind, name in self.TIMED:
            self._replace(kind, name, self._timed)
        self._replace(UpdateGuard, "_usual_norms", self._compared)
        self._replace(Directions, "outliers", self._related)

    def __exit__(self, *_: object) -> None:
        for kind, name, original in self._originals:
            setattr(kind, name, original)

    def _replace(self, kind: type, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        original = getattr(kind, name)
        self._originals.append((kind, name, original))
        setattr(kind, name, wrap(original))

    def _timed(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            start = time.process_time()
            try:
                return original(*given)
            finally:
                self.seconds += time.process_time() - start

        return call

    def _compared(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(guard: UpdateGuard, items: Any, norms: Any, current: Any) -> Any:
            usual = original(guard, items, norms, current)
            factor = FACTOR if len(items) >= FEW else FACTOR_OF_FEW
            self.largest = max(self.largest, *(n / (factor * m) for n, m in zip(norms, usual, strict=True) if m))
            return usual

        return call

    def _related(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(directions: Directions) -> Any:
            of_others = np.where(np.eye(len(directions.common), dtype=bool), 0.0, directions.common)
            self.least = min(self.least, float(of_others.max(axis=1).min()))
            return original(directions)

        return call


if __name__ == "__main__":
    main()
