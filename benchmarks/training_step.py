"""Training speed of one device by method and precision, in images per second on one thread; the size of its
network and of a message with its suffix.

    python benchmarks/training_step.py [--width 20] [--batch 32] [--epochs 3] [--toy]

Ratios are valid only within one run. The variants are measured in turn, several times, and the median is reported.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch

from lightcl.assembly import build_network
from lightcl.data.partition import Share
from lightcl.data.sources import ImageSet, Source
from lightcl.device.device import EdgeDevice
from lightcl.exchange.tensors import outgoing, size_in_bytes
from lightcl.scenario import Scenario

VARIANTS: dict[str, dict[str, object]] = {
    "SGD, whole network": {"name": "sgd"},
    "LightCL, β = 0": {"name": "lightcl", "beta": 0},
    "LightCL": {"name": "lightcl"},
    "LightCL, sparse": {"name": "lightcl-sparse"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=20)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=3, help="of 8 steps each")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--toy", action="store_true", help="smallest size; the figures are meaningless")
    chosen = parser.parse_args()
    if chosen.toy:
        chosen.width, chosen.batch, chosen.epochs, chosen.repeats = 4, 4, 2, 1
    rates: dict[tuple[str, str], list[float]] = {}
    for _ in range(chosen.repeats):
        for precision in ("fp32", "bf16"):
            for name, method in VARIANTS.items():
                rate = images_per_second(scenario_of(method, precision, chosen))
                rates.setdefault((precision, name), []).append(rate)
    base = median(rates["fp32", "SGD, whole network"])
    print(f"ResNet-18 width {chosen.width}, 32x32, batch {chosen.batch}, 1 thread, torch {torch.__version__}")
    print("| precision | method | images/s | ratio | parameters | suffix message, KiB |\n|---|---|---|---|---|---|")
    for (precision, name), values in rates.items():
        network = build_network(scenario_of(VARIANTS[name], precision, chosen), in_channels=3, classes=4)
        parameters = sum(p.numel() for p in network.parameters())
        message = size_in_bytes(outgoing(network, "suffix")) / 1024
        rate = median(values)
        print(f"| {precision} | {name} | {rate:.0f} | {rate / base:.2f} | {parameters} | {message:.0f} |")


def scenario_of(method: dict[str, object], precision: str, chosen: argparse.Namespace) -> Scenario:
    training = {"epochs": chosen.epochs, "batch_size": chosen.batch, "checkpoint_seconds": 1e8}
    return Scenario.model_validate(
        {
            "network": {"weights": "none", "width": chosen.width},
            "method": method,
            "fleet": {"devices": 1},
            "stream": {"tasks": 2, "held_out": 0},
            "training": training,
            "device": {"precision": precision},
            "data": {"augmentation": "crop-flip"},
        }
    )


def images_per_second(scenario: Scenario) -> float:
    """The second task (the first in which LightCL regularizes), from the end of its first epoch to that of its last."""
    batch, epochs = scenario.training.batch_size, scenario.training.epochs
    draw = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 4 * batch)
    images = ImageSet(draw.integers(0, 256, (len(labels), 32, 32, 3), dtype=np.uint8), labels, tuple("0123"))
    everything = np.arange(len(labels))
    ends: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        share = Share(everything, everything)
        device = EdgeDevice(scenario, 0, Path(folder), source=Source(images, images), share=share)
        for task in range(2):
            ends.clear()
            device.train(task, epochs, lambda *_: ends.append(time.perf_counter()))
    return (epochs - 1) * len(device.stream[1].train) / (ends[-1] - ends[0])


if __name__ == "__main__":
    main()
