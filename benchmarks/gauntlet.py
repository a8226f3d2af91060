"""Three devices, one of them hostile in one way after the other: what the honest two are left with.

    python -m benchmarks.gauntlet --seeds 3 --jobs 2

Server and devices are real, in one process; device 2 changes its replies before they are sent. Each row is one attack
in every round of a run; figures are means over the two honest devices and the seeds, in percent, and the difference to
the same run in which device 2 stays silent. By default the server does not know the devices' images, as with boards
that have their own; with --known it does, as in a simulation. --guard off shows what the guard is worth.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message
from flwr.common.constant import ErrorCode

from lightcl.exchange.tensors import is_statistic
from lightcl.preparation import prepare
from lightcl.records.folder import RunFolder
from lightcl.scenario import Scenario
from server.ledger import KnownImages
from server.listeners import Listener
from server.rounds import Coordinator, RunFailure
from tests.inprocess import InProcessGrid

HOSTILE = 2
SETTINGS: dict[str, dict[str, Any]] = {
    "suffix": {"server": {"aggregation": "suffix"}},
    "suffix+head": {"server": {"aggregation": "suffix+head"}},
    "class sums": {"method": {"name": "lightcl-plus", "share_statistics": True}},
}
SCENARIO: dict[str, Any] = {
    "data": {"source": "digits", "image_size": 16, "views": 3},
    "stream": {"tasks": 2},
    "fleet": {"devices": 3, "test_data": "whole"},
    "network": {"weights": "builtin"},
    "training": {"epochs": 2, "batch_size": 8, "learning_rate": 0.01},
}
TOY: dict[str, Any] = {
    "data": {"source": "digits"},
    "stream": {"tasks": 1},
    "fleet": {"devices": 3},
    "network": {"weights": "none", "width": 4},
    "training": {"epochs": 1, "batch_size": 32},
}

Arrays = dict[str, np.ndarray]
Change = Callable[[Arrays, Arrays, np.random.Generator], Arrays]
"""The tensors to send, from those of an honest reply and the last model."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--guard", choices=["clip", "refuse", "off"], default="clip")
    parser.add_argument("--strategy", default="FedAvg", help="server.strategy, e.g. FedMedian")
    parser.add_argument("--known", action="store_true", help="the server knows how many images a device has")
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--attacks", nargs="+", metavar="ATTACK", help="some of them, by their names in the table")
    parser.add_argument("--toy", action="store_true", help="two attacks on a tiny run; the figures mean nothing")
    chosen = parser.parse_args()
    wanted = [(setting, attack) for setting in chosen.settings for attack in ATTACKS[setting]]
    if chosen.attacks:
        wanted = [(s, a) for s, a in wanted if a in chosen.attacks or a == "silent"]
    if chosen.toy:
        wanted = [("suffix", "silent"), ("suffix", "update x 10^6"), ("class sums", "silent")]
        wanted += [("class sums", "features x 10^6")]
    cases = [
        Case(setting, attack, seed, chosen.guard, chosen.strategy, chosen.known, chosen.toy)
        for setting, attack in wanted
        for seed in range(chosen.seeds)
    ]
    print("| shared | attack | answer | honest devices at the end | TIL | CIL | TIL - silent | CIL - silent |")
    print("|---|---|---|---|---|---|---|---|")
    silent: dict[str, tuple[float, float]] = {}
    with ProcessPoolExecutor(chosen.jobs, mp_context=get_context("spawn")) as pool:
        found = pool.map(run, cases)
        for setting, attack in wanted:
            ends = [next(found) for _ in range(chosen.seeds)]
            til, cil = (100 * fmean(end.accuracy[i] for end in ends) for i in (0, 1))
            if attack == "silent":
                silent[setting] = til, cil
            answers = ", ".join(dict.fromkeys(end.answer for end in ends))
            honest = f"{sum(end.finished for end in ends)} of {2 * len(ends)}"
            model = "" if all(end.finite for end in ends) else ", MODEL NOT FINITE"
            differences = [f"{now - then:+.1f}" for now, then in zip((til, cil), silent[setting], strict=True)]
            row = [setting, attack, answers, honest + model, f"{til:.1f}", f"{cil:.1f}", *differences]
            print(f"| {' | '.join(row)} |", flush=True)


@dataclass(frozen=True)
class Case:
    setting: str
    attack: str
    seed: int
    guard: str
    strategy: str
    known: bool
    toy: bool


@dataclass(frozen=True)
class End:
    """How a run ended. `accuracy`: TIL and CIL over the honest devices, 0..1."""

    finished: int
    finite: bool
    accuracy: tuple[float, float]
    answer: str


class Answers(Listener):
    """Counts what the server did about device 2."""

    def __init__(self) -> None:
        self.limits = self.refusals = 0

    def warned(self, text: str) -> None:
        self.limits += f"device {HOSTILE}:" in text or "left out" in text

    def refused(self, device: int, reason: str) -> None:
        self.refusals += device == HOSTILE

    def text(self, dropped: bool) -> str:
        if dropped:
            return "dropped"
        limited = f"limited {self.limits} times" if self.limits else ""
        refused = f"refused {self.refusals} times" if self.refusals else ""
        return ", ".join(filter(None, (limited, refused))) or "accepted"


def run(case: Case) -> End:
    torch.set_num_threads(1)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    values = (TOY if case.toy else SCENARIO) | SETTINGS[case.setting] | {"seed": case.seed}
    values["server"] = {**values.get("server", {}), "guard": case.guard, "strategy": case.strategy}
    scenario = Scenario.model_validate(values)
    prepared = prepare(scenario)
    answers, draw = Answers(), np.random.default_rng(case.seed)
    attack = ATTACKS[case.setting][case.attack]

    def tamper(message: Message, reply: Message) -> Message:
        instruction = message.content.config_records.get("instruction")
        if instruction is None or message.metadata.message_type == "query" or instruction["device"] != HOSTILE:
            return reply
        if case.attack == "silent":
            return Message(Error(ErrorCode.NODE_UNAVAILABLE, "silent"), reply_to=message)
        if message.metadata.message_type == "train" and "reason" not in reply.content.config_records["reply"]:
            assert coordinator.aggregator is not None
            arrays = {name: array.numpy().copy() for name, array in reply.content.array_records["arrays"].items()}
            changed = attack.change(arrays, coordinator.aggregator.arrays, draw)
            reply.content["arrays"] = ArrayRecord({name: Array(array) for name, array in changed.items()})
            record = dict(reply.content.config_records["reply"])
            reply.content["reply"] = ConfigRecord(record | {"examples": attack.examples or record["examples"]})
        return reply

    with tempfile.TemporaryDirectory() as temporary:
        folder = RunFolder(Path(temporary) / "run")
        folder.begin(scenario, {"run": "r"}, [])
        images = KnownImages.of(prepared) if case.known else None
        coordinator = Coordinator(scenario, folder, "r", answers, prepared.tasks, images=images, durable=False)
        with suppress(RunFailure):
            coordinator.run(InProcessGrid(Path(temporary) / "states", 3, tamper))
        honest = [coordinator.ledger[number] for number in range(3) if number != HOSTILE]
        rows = [[entry.rows[setting] for entry in honest] for setting in ("til", "cil")]
        accuracies = [[fmean(row[max(row)]) if row else 0.0 for row in of_setting] for of_setting in rows]
        assert coordinator.aggregator is not None
        finite = all(np.isfinite(array).all() for array in coordinator.aggregator.arrays.values())
        finished = sum(entry.finished(scenario) for entry in honest)
        dropped = coordinator.ledger[HOSTILE].dropped
    return End(finished, finite, (fmean(accuracies[0]), fmean(accuracies[1])), answers.text(bool(dropped)))


# -- attacks -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attack:
    change: Change = lambda arrays, model, draw: arrays
    examples: int = 0
    """What the reply says; 0: the truth."""


def moved(factor: float) -> Change:
    """The update, times a factor."""
    return lambda arrays, model, draw: {
        name: array if is_statistic(name) else (model[name] + factor * (array - model[name])).astype(np.float32)
        for name, array in arrays.items()
    }


def noise(factor: float) -> Change:
    """Noise of the update's norm, times a factor."""

    def change(arrays: Arrays, model: Arrays, draw: np.random.Generator) -> Arrays:
        names = [name for name in arrays if not is_statistic(name)]
        norm = np.sqrt(sum(((arrays[name] - model[name]).astype(np.float64) ** 2).sum() for name in names))
        drawn = {name: draw.normal(size=arrays[name].shape) for name in names}
        length = np.sqrt(sum((array**2).sum() for array in drawn.values()))
        return arrays | {n: (model[n] + factor * norm / length * drawn[n]).astype(np.float32) for n in names}

    return change


def mixed(share: float) -> Change:
    """Noise of the update's norm beside a share of the update."""
    spoil = noise(1)

    def change(arrays: Arrays, model: Arrays, draw: np.random.Generator) -> Arrays:
        noisy = spoil(arrays, model, draw)
        return {
            name: array if is_statistic(name) else noisy[name] + np.float32(share) * (array - model[name])
            for name, array in arrays.items()
        }

    return change


def variance(value: float) -> Change:
    return lambda arrays, model, draw: {
        name: np.full_like(array, value) if name.endswith("running_var") else array for name, array in arrays.items()
    }


def shifted(deviations: float) -> Change:
    """Batch-norm means, this many of the last model's standard deviations away from them."""

    def change(arrays: Arrays, model: Arrays, draw: np.random.Generator) -> Arrays:
        changed = dict(arrays)
        for name in [name for name in arrays if name.endswith("running_mean")]:
            deviation = np.sqrt(model[name.removesuffix("mean") + "var"].mean())
            changed[name] = (model[name] + deviations * deviation).astype(np.float32)
        return changed

    return change


def wider(factor: float) -> Change:
    """The device's batch-norm variances, times a factor."""
    return lambda arrays, model, draw: {
        name: (factor * array).astype(np.float32) if name.endswith("running_var") else array
        for name, array in arrays.items()
    }


def float64(value: float) -> Change:
    return lambda arrays, model, draw: {name: np.full(array.shape, value) for name, array in arrays.items()}


def sums(factor: float, *, permuted: bool = False, counts: bool = False) -> Change:
    """Features times a factor, with the labels of the device's classes rotated, or everything times a factor."""

    def change(arrays: Arrays, model: Arrays, draw: np.random.Generator) -> Arrays:
        count, total, gram = (arrays.get(f"statistics/{name}") for name in ("count", "total", "gram"))
        if count is None or total is None or gram is None:
            return arrays
        if permuted:
            own = np.flatnonzero(count)
            count[own], total[own] = count[np.roll(own, 1)], total[np.roll(own, 1)]
        with np.errstate(over="ignore", invalid="ignore"):
            total *= factor
            gram *= factor if counts else np.float64(factor) ** 2
            count *= factor if counts else 1.0
        return arrays

    return change


OF_WEIGHTS = {
    "silent": Attack(),
    "none (an honest third device)": Attack(),
    "update x 10": Attack(moved(10)),
    "update x 1.9": Attack(moved(1.9)),
    "update x 10^6": Attack(moved(1e6)),
    "noise of the update's norm": Attack(noise(1)),
    "noise x 10^6": Attack(noise(1e6)),
    "noise beside a tenth of the update": Attack(mixed(0.1)),
    "noise beside a third of the update": Attack(mixed(1 / 3)),
    "sign flip": Attack(moved(-1)),
    "sign flip x 1.9": Attack(moved(-1.9)),
    "sign flip x 10": Attack(moved(-10)),
    "variance 1e30": Attack(variance(1e30)),
    "means + 3 sd": Attack(shifted(3)),
    "means + 9 sd": Attack(shifted(9)),
    "variances x 9": Attack(wider(9)),
    "10^12 examples, noise": Attack(noise(1), 10**12),
    "10^12 examples, sign flip x 10": Attack(moved(-10), 10**12),
    "fp64 values of 1e300": Attack(float64(1e300)),
    "fp64 values of 1e39": Attack(float64(1e39)),
}
ATTACKS: dict[str, dict[str, Attack]] = {
    "suffix": OF_WEIGHTS,
    "suffix+head": OF_WEIGHTS,
    "class sums": {
        "silent": Attack(),
        "none (an honest third device)": Attack(),
        "permuted labels, sums x 10^6": Attack(sums(1e6, permuted=True, counts=True)),
        "permuted labels": Attack(sums(1, permuted=True)),
        "permuted labels, features x 1.9": Attack(sums(1.9, permuted=True)),
        "features x 10^6": Attack(sums(1e6)),
        "sums of 1e308": Attack(sums(1e308)),
    },
}


if __name__ == "__main__":
    main()
