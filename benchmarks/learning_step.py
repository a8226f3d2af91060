"""Speed of a LightCL training step, compared with a literal twin of the paper's on the same images in one run.

    python benchmarks/learning_step.py [--widths 20,64] [--steps 24] [--repeats 5] [--threads 2] [--errors] [--toy]

The twin (tests/reference/paper_step.py) computes the entire network in training mode, for the batch and again for the
memory samples, on images with the same augmentation. Ours is the device's own training loop over entire epochs of the
second task, so it includes drawing, augmenting, reading and updating. The variants take turns, and the median of their
rates is reported. On a busy machine the fastest rate of each, in the last column, is the more stable figure. `floor` is
the arithmetic of suffix and head only: forward and backward of the two passes on fixed features, without loss terms,
updates or reading.

`--errors` prints the largest error of a logit under a rounded prefix cache, relative to the image's largest logit.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from lightcl.assembly import build_network
from lightcl.data.augment import augmented
from lightcl.data.partition import Share
from lightcl.data.sources import ImageSet, Source
from lightcl.data.tasks import Batch
from lightcl.device.device import EdgeDevice
from lightcl.device.prefix import DTYPES, FixedPrefix
from lightcl.device.training import autocast, train_epoch
from lightcl.networks.staged import Backbone
from lightcl.scenario import Scenario
from tests.reference.paper_step import PaperStep

OURS: dict[str, dict[str, dict[str, object]]] = {
    "fresh augmentation, no cache": {},
    "fresh augmentation, no cache, joint": {"method": {"memory_pass": "joint"}},
    "2 views, no cache": {"data": {"views": 2}, "device": {"prefix_cache": "off"}},
    "2 views, cache": {"data": {"views": 2}},
    "2 views, cache, at once": {"data": {"views": 2}, "training": {"update": "at-once"}},
    "2 views, cache, joint": {"data": {"views": 2}, "method": {"memory_pass": "joint"}},
    "2 views, cache, joint, Winograd": {
        "data": {"views": 2}, "method": {"memory_pass": "joint"}, "device": {"convolutions": "winograd"},
    },
    "fresh augmentation, no cache, joint, Winograd": {
        "method": {"memory_pass": "joint"}, "device": {"convolutions": "winograd"},
    },
    "2 views, no cache, joint, Winograd": {
        "data": {"views": 2}, "method": {"memory_pass": "joint"},
        "device": {"convolutions": "winograd", "prefix_cache": "off"},
    },
    "2 views, cache, joint, native": {
        "data": {"views": 2}, "method": {"memory_pass": "joint"}, "device": {"convolutions": "native"},
    },
    "fresh augmentation, no cache, joint, native": {
        "method": {"memory_pass": "joint"}, "device": {"convolutions": "native"},
    },
    "2 views, bf16, cache, joint, native": {
        "data": {"views": 2}, "method": {"memory_pass": "joint"},
        "device": {"convolutions": "native", "precision": "bf16"},
    },
    "fresh augmentation, bf16, no cache": {"device": {"precision": "bf16"}},
    "2 views, bf16, cache": {"data": {"views": 2}, "device": {"precision": "bf16"}},
    "2 views, bf16, cache, joint": {
        "data": {"views": 2}, "method": {"memory_pass": "joint"}, "device": {"precision": "bf16"},
    },
}  # fmt: skip
MEMORY = 15
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
RATE = 1e-6
"""Learning rate: so small that the random weights, and with them the time of a step, hardly change."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", default="20,64")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=24, help="steps of an epoch, the unit that is timed")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu: processor time, for a busy machine")
    parser.add_argument("--only", help="names of the variants of ours, by their beginnings, separated by |")
    parser.add_argument("--errors", action="store_true", help="measure rounding instead of time")
    parser.add_argument("--toy", action="store_true", help="smallest size; the figures are meaningless")
    chosen = parser.parse_args()
    if chosen.toy:
        chosen.widths, chosen.batch, chosen.steps, chosen.repeats, chosen.threads = "4", 4, 2, 1, 1
    with tempfile.TemporaryDirectory() as cache:
        os.environ["LIGHTCL_CACHE"] = cache
        if chosen.errors:
            print_errors()
            return
        for width in map(int, chosen.widths.split(",")):
            print_rates(width, chosen)


def print_rates(width: int, chosen: argparse.Namespace) -> None:
    rates: dict[str, list[float]] = {}
    clock = CLOCKS[chosen.clock]
    named = {
        name: sections for name, sections in OURS.items()
        if not chosen.only or any(name.startswith(part) for part in chosen.only.split("|"))
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        variants = {
            "the paper's step": paper(width, chosen, torch.contiguous_format),
            "the paper's step, channels-last": paper(width, chosen, torch.channels_last),
            "floor, fp32": floor(width, chosen),
        } | {
            name: ours(width, sections, chosen, Path(folder, str(number)))
            for number, (name, sections) in enumerate(named.items())
        }
        for run in variants.values():  # warms up; fills the cache: an epoch for each view
            run()
            run()
        for _ in range(chosen.repeats):
            for name, run in variants.items():
                start = clock()
                images = run()
                rates.setdefault(name, []).append(images / (clock() - start))
    base, fastest = median(rates["the paper's step"]), max(rates["the paper's step"])
    print(
        f"\nResNet-18 width {width}, 32x32, batch {chosen.batch}, memory {MEMORY}, {chosen.threads} thread(s), "
        f"torch {torch.__version__}, median of {chosen.repeats}, "
        f"{chosen.clock} time\n"
    )
    print(
        "| step | ms | images/s | ratio | lowest and highest ratio | ratio of the fastest |\n|---|---|---|---|---|---|"
    )
    for name, values in rates.items():
        rate = median(values)
        single = [value / b for value, b in zip(values, rates["the paper's step"], strict=True)]
        print(
            f"| {name} | {1000 * chosen.batch / rate:.1f} | {rate:.0f} | {rate / base:.2f} "
            f"| {min(single):.2f} to {max(single):.2f} "
            f"| {max(values) / fastest:.2f} |"
        )


def scenario_of(width: int, sections: dict[str, dict[str, object]], chosen: argparse.Namespace) -> Scenario:
    values: dict[str, dict[str, object]] = {
        "network": {"weights": "none", "width": width},
        "method": {"name": "lightcl", "memory_size": MEMORY},
        "fleet": {"devices": 1},
        "stream": {"tasks": 2, "held_out": 0},
        "training": {"epochs": 1000, "batch_size": chosen.batch, "checkpoint_seconds": 1e8, "learning_rate": RATE},
        "device": {"accelerator": "cpu", "threads": chosen.threads},
        "data": {"augmentation": "crop-flip"},
    }
    merged = {key: section | sections.get(key, {}) for key, section in values.items()}
    return Scenario.model_validate(merged)


def images_of(chosen: argparse.Namespace) -> ImageSet:
    """Noise of four classes; each of the two tasks has `steps` batches."""
    draw = np.random.default_rng(0)
    labels = np.tile(np.arange(4), chosen.steps * chosen.batch // 2)
    return ImageSet(draw.integers(0, 256, (len(labels), 32, 32, 3), dtype=np.uint8), labels, tuple("0123"))


def ours(
    width: int, sections: dict[str, dict[str, object]], chosen: argparse.Namespace, folder: Path
) -> Callable[[], int]:
    """Trains an epoch of the second task with every call, as a device does; returns the number of images."""
    images = images_of(chosen)
    everything = np.arange(len(images))
    scenario = scenario_of(width, sections, chosen)
    device = EdgeDevice(scenario, 0, folder, source=Source(images, images), share=Share(everything, everything))
    first, second = device._context(0), device._context(1)
    with autocast(scenario, device.accelerator):  # as a device does
        device.method.begin_task(first)
        device.network.eval()
        device.method.end_task(first)
        device.network.train()
        device.method.begin_task(second)
    epochs = iter(range(10**6))

    def run() -> int:
        torch.set_num_threads(chosen.threads)
        train_epoch(device.method, device.optimizer, second, scenario, next(epochs))
        return len(second.task.train)

    return run


def paper(width: int, chosen: argparse.Namespace, layout: torch.memory_format) -> Callable[[], int]:
    """The twin, on newly augmented batches of the same images."""
    images = images_of(chosen)
    members = np.flatnonzero(images.labels >= 2)
    pixels = torch.from_numpy(images.images[members]).permute(0, 3, 1, 2).contiguous(memory_format=layout)
    labels, classes = torch.from_numpy(images.labels[members]), torch.tensor([2, 3])
    network = network_of(width, chosen).to(memory_format=layout)
    generator = torch.Generator().manual_seed(0)
    vital = {
        name: torch.arange(network.map_channels(name)) < 0.15 * network.map_channels(name)
        for name in network.suffix.map_names
    }
    step = PaperStep(network, pixels[:MEMORY], vital, rate=RATE)

    def run() -> int:
        torch.set_num_threads(chosen.threads)
        for part in torch.split(torch.randperm(len(labels), generator=generator), chosen.batch):
            batch = augmented(pixels[part], generator, "crop-flip", 4).contiguous(memory_format=layout)
            step.step(batch, labels[part], classes)
        return len(labels)

    return run


def floor(width: int, chosen: argparse.Namespace) -> Callable[[], int]:
    """Forward and backward of suffix and head for batch and memory samples, on fixed features."""
    network = network_of(width, chosen).train()
    with torch.no_grad():
        features = network.features(torch.zeros(chosen.batch + MEMORY, 3, 32, 32, dtype=torch.uint8))
    parts = torch.split(features, [chosen.batch, MEMORY])

    def run() -> int:
        torch.set_num_threads(chosen.threads)
        for _ in range(chosen.steps):
            torch.stack([network.classify(part).sum() for part in parts]).sum().backward()
            network.zero_grad()
        return chosen.steps * chosen.batch

    return run


def network_of(width: int, chosen: argparse.Namespace) -> Backbone:
    network = build_network(scenario_of(width, {}, chosen), in_channels=3, classes=4)
    return network.to(memory_format=torch.channels_last)


@contextmanager
def rounded(network: Backbone, dtype: torch.dtype | None) -> Iterator[FixedPrefix]:
    with torch.no_grad():
        yield FixedPrefix(network, rounding=dtype)


def print_errors() -> None:
    """With the built-in weights, on smoothed noise."""
    scenario = Scenario.model_validate({"device": {"accelerator": "cpu"}, "method": {"name": "lightcl"}})
    network = build_network(scenario, in_channels=3, classes=10).eval()
    noise = torch.rand(256, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(noise, (32, 32), mode="bicubic").clamp(0, 1)
    batch = Batch(smooth.mul(255).to(torch.uint8), torch.zeros(256))
    print("| prefix_cache_dtype | largest error of a logit, relative to the image's largest |\n|---|---|")
    with rounded(network, None) as features:
        exact = network.classify(features([batch]))
    for name, dtype in DTYPES.items():
        with rounded(network, dtype) as features:
            moved = (network.classify(features([batch])) - exact).abs().amax(1)
        print(f"| {name} | {(moved / exact.abs().amax(1)).max():.1e} |")


if __name__ == "__main__":
    main()
