"""Every method beside plain SGD on a small stream of real images: the digits, five tasks of two.

    python benchmarks/digits_methods.py --seeds 3                 # width 8 from random weights, 8 epochs at 0.03
    python benchmarks/digits_methods.py --seeds 3 --pretrained    # the built-in weights (width 20), 5 epochs at 0.01

One of three devices (about 85 training images per task), batch 16, one thread. A sanity check that takes minutes, not a
replacement for the paper's comparison. Learning rates are not tuned per method.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np

from lightcl.device.device import EdgeDevice
from lightcl.device.training import TrainingFailure
from lightcl.scenario import Scenario

METHODS = [
    {"name": "sgd"}, {"name": "sgd", "loss_classes": "all"}, {"name": "joint", "loss_classes": "all"},
    {"name": "ewc", "fisher_samples": 60}, {"name": "pnn"}, {"name": "fdr"},
    {"name": "er"}, {"name": "er", "loss_classes": "task"},
    {"name": "derpp"}, {"name": "derpp", "loss_classes": "task"},
    {"name": "sparcl-er"}, {"name": "sparcl-derpp"}, {"name": "lightcl"},
]  # fmt: skip


TOY = {"network": {"weights": "none", "width": 4}, "stream": {"tasks": 2}}
"""Sections for `--toy`."""


def learn(method: dict[str, object], seed: int, pretrained: bool, toy: bool = False) -> list[float]:
    """TIL accuracy and forgetting, CIL accuracy and forgetting (NaN where it is not tested), in percent."""
    network = {"weights": "builtin"} if pretrained else {"weights": "none", "width": 8}
    training = {"epochs": 5, "learning_rate": 0.01} if pretrained else {"epochs": 8, "learning_rate": 0.03}
    values = {
        "seed": seed, "fleet": {"devices": 3, "test_data": "whole"}, "network": network, "method": method,
        "training": {"batch_size": 16, **training}, "device": {"accelerator": "cpu"},
    }  # fmt: skip
    if toy:
        values |= TOY | {"training": {"batch_size": 16, "epochs": 1}}
    scenario = Scenario.model_validate(values)
    figures = [float("nan")] * 4
    with tempfile.TemporaryDirectory() as folder:
        device = EdgeDevice(scenario, 0, Path(folder))
        for task in range(scenario.first_task, scenario.stream.tasks):
            device.train(task, scenario.training.epochs)
            device.evaluate()
    for at, setting in enumerate(scenario.settings):
        matrix = device.matrix(setting)
        forgetting = float("nan") if scenario.method.joint else matrix.forgetting()
        figures[2 * at : 2 * at + 2] = 100 * matrix.average_accuracy(), 100 * forgetting
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pretrained", action="store_true")
    parser.add_argument("--toy", action="store_true", help="smallest size; the figures are meaningless")
    options = parser.parse_args()
    if options.toy:
        options.seeds = 1
    print("| method | TIL | TIL forgetting | CIL | CIL forgetting |\n|---|---|---|---|---|", flush=True)
    for method in METHODS:
        try:
            runs = np.array([learn(method, seed, options.pretrained, options.toy) for seed in range(options.seeds)])
        except TrainingFailure as failure:
            print(f"| {json.dumps(method)} | {failure} | | | |", flush=True)
            continue
        cells = [f"{m:.1f} ± {s:.1f}" if m == m else "" for m, s in zip(runs.mean(0), runs.std(0), strict=True)]
        name = method["name"] + (f" ({method['loss_classes']})" if "loss_classes" in method else "")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
