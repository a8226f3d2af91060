"""Heads and features of lightcl-plus's closed-form classifier compared, on the networks of finished runs.

    lightcl simulate cifar10-10-devices --set method.name=lightcl-plus --out RUN ...
    python benchmarks/closed_form_heads.py RUN [RUN ...]

For every device of the runs (one run per seed) the final network is opened, the statistics are collected again in the
order of its stream, and each head classifies the device's test images. Figures: mean over the devices, then mean ±
standard error over the runs, in percent; bytes that a device keeps for the head.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean, stdev

import torch
from torch import Tensor
from torch.nn import functional as F

from lightcl.data.partition import partition
from lightcl.data.sources import load_source
from lightcl.data.tasks import Samples
from lightcl.device.device import EdgeDevice
from lightcl.device.training import autocast
from lightcl.methods.lightcl_plus import LightCLPlus
from lightcl.methods.parts.closed_form import (
    LinearHead,
    Statistics,
    discriminant_head,
    from_upper_triangle,
    statistics_bytes,
)
from lightcl.records import load_run

Solve = Callable[[Statistics, float], LinearHead]


def nearest_mean(statistics: Statistics, shrinkage: float) -> LinearHead:
    """-|x - μ_c|² / 2, in units of the mean variance within a class."""
    means = statistics.total / statistics.count.clamp_min(1)[:, None]
    gram = from_upper_triangle(statistics.gram, means.shape[1])
    variance = ((gram - statistics.total.T @ means) / statistics.count.sum()).diagonal().mean()
    weight = means / variance
    return LinearHead(weight.float(), (-0.5 * (means * weight).sum(1)).float(), (statistics.count > 0).float())


def ridge_regression(statistics: Statistics, shrinkage: float) -> LinearHead:
    """Least squares on one-hot targets, centered; the penalty is a share of the features' mean variance."""
    count = statistics.count.sum()
    center, prior = statistics.total.sum(0) / count, statistics.count / count
    gram = from_upper_triangle(statistics.gram, len(center)) / count - torch.outer(center, center)
    gram.diagonal().add_(shrinkage * gram.diagonal().mean())
    weight = torch.linalg.solve(gram, (statistics.total / count - torch.outer(prior, center)).T).T
    return LinearHead(weight.float(), (prior - weight @ center).float(), (statistics.count > 0).float())


HEADS: dict[str, Solve] = {"LDA": discriminant_head, "nearest class mean": nearest_mean, "ridge": ridge_regression}
VARIANTS: dict[str, tuple[str, str, float, bool]] = {
    # name: (head, features, weight of the suffix's head, shared by the fleet)
    "nearest class mean, last map": ("nearest class mean", "last map", 0.0, False),
    "LDA, last map": ("LDA", "last map", 0.0, False),
    "LDA, last layer's maps": ("LDA", "last layer", 0.0, False),
    "nearest class mean, last layer's maps and grid": ("nearest class mean", "last layer, grid", 0.0, False),
    "ridge, last layer's maps and grid": ("ridge", "last layer, grid", 0.0, False),
    "LDA, last layer's maps and grid": ("LDA", "last layer, grid", 0.0, False),
    "LDA, all frozen maps and grid": ("LDA", "all, grid", 0.0, False),
    "LDA, last layer's maps and grid, with the suffix (lightcl-plus)": ("LDA", "last layer, grid", 1.0, False),
    "the same, one LDA for the fleet": ("LDA", "last layer, grid", 1.0, True),
}
FEATURES = {"last map": (1, False), "last layer": (4, False), "last layer, grid": (4, True), "all, grid": (64, True)}
SHRINKAGE = 0.01
TOY = """\
name: toy
network: {weights: none, width: 4}
stream: {tasks: 2}
fleet: {devices: 1}
training: {epochs: 1, batch_size: 64}
method: {name: lightcl-plus}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="*", metavar="RUN")
    parser.add_argument("--toy", action="store_true", help="on one tiny run; the figures are meaningless")
    chosen = parser.parse_args()
    if not chosen.runs and not chosen.toy:
        parser.error("name the RUN folders, or --toy")
    with tempfile.TemporaryDirectory() as folder:
        runs = [compare(path) for path in ([toy_run(Path(folder))] if chosen.toy else chosen.runs)]
    print("| head | TIL | CIL | kept per device |\n|---|---|---|---|")
    for name, (_, size) in runs[0].items():
        cells = [spread([fmean(figures[i] for figures in run[name][0]) for run in runs]) for i in (0, 1)]
        print(f"| {name} | {' | '.join(cells)} | {f'{size / 1e6:.2f} MB' if size else '–'} |")


def toy_run(folder: Path) -> Path:
    """A run of two tasks on one device, in seconds."""
    scenario, run = folder / "toy.yaml", folder / "run"
    scenario.write_text(TOY)
    lightcl = [sys.executable, "-m", "simulations.main", "train"]
    subprocess.run([*lightcl, scenario, "--out", run], check=True, stdout=subprocess.DEVNULL)
    return run


def spread(values: list[float]) -> str:
    error = f" ± {100 * stdev(values) / math.sqrt(len(values)):.2f}" if len(values) > 1 else ""
    return f"{100 * fmean(values):.2f}{error}"


def compare(path: Path) -> dict[str, tuple[list[tuple[float, float]], int]]:
    """For every variant (TIL, CIL) of each device, and the bytes of its statistics."""
    run = load_run(path)
    scenario = run.scenario
    torch.set_num_threads(scenario.device.threads)
    source = load_source(scenario.source_request())
    shares = partition(source, scenario.fleet, scenario.seed)
    devices = []
    for number, share in enumerate(shares):
        state = path / "devices" / str(run.about["run"]) / f"device-{number:05d}"
        device = EdgeDevice(scenario, number, state, source=source, share=share)
        device.network.eval()
        sums = {f: Statistics.zeros(device.stream.head_classes, _width(device, *FEATURES[f])) for f in FEATURES}
        for task in device.stream:
            for maps, _, labels in _pass(device, task.train):
                for kind, statistics in sums.items():
                    statistics.add_(_describe(maps, *FEATURES[kind]), labels)
        devices.append((device, sums))
    totals = {kind: Statistics.zeros(*devices[0][1][kind].total.shape) for kind in FEATURES}
    for _, sums in devices:
        for kind, total in totals.items():
            for name, tensor in total.tensors().items():
                tensor += sums[kind].tensors()[name]
    found: dict[str, tuple[list[tuple[float, float]], int]] = {"LightCL's own head": ([], 0)}
    for name, (_, kind, _, _) in VARIANTS.items():
        classes, width = totals[kind].total.shape
        found[name] = ([], statistics_bytes(classes, width))
    for device, sums in devices:
        for name, figures in _accuracies(device, sums, totals).items():
            found[name][0].append(figures)
    return found


def _accuracies(
    device: EdgeDevice, sums: dict[str, Statistics], totals: dict[str, Statistics]
) -> dict[str, tuple[float, float]]:
    method = device.method
    assert isinstance(method, LightCLPlus)
    heads = {
        name: HEADS[head](totals[kind] if fleet else sums[kind], SHRINKAGE)
        for name, (head, kind, _, fleet) in VARIANTS.items()
    }
    til: dict[str, list[float]] = {}
    cil: dict[str, list[float]] = {}
    for task in device.stream:
        classes = torch.tensor(task.rows)
        right = {name: [0, 0] for name in ("LightCL's own head", *VARIANTS)}
        for maps, logits, labels in _pass(device, task.test):
            scores = {"LightCL's own head": logits}
            for name, (_, kind, weight, _) in VARIANTS.items():
                scores[name] = heads[name].log_posteriors(_describe(maps, *FEATURES[kind]))
                if weight:
                    scores[name] = scores[name] + weight * method._within_tasks(logits)
            for name, answer in scores.items():
                right[name][0] += int((classes[answer[:, classes].argmax(1)] == labels).sum())
                right[name][1] += int((answer.argmax(1) == labels).sum())
        for name, (known, unknown) in right.items():
            til.setdefault(name, []).append(known / len(task.test))
            cil.setdefault(name, []).append(unknown / len(task.test))
    return {name: (fmean(til[name]), fmean(cil[name])) for name in til}


def _pass(device: EdgeDevice, samples: Samples) -> Iterator[tuple[dict[str, Tensor], Tensor, Tensor]]:
    """The prefix's maps, the suffix's logits `[N, C]` and the labels, batch by batch."""
    for batch in samples.batches(64):
        maps: dict[str, Tensor] = {}
        with torch.no_grad(), autocast(device.scenario, device.accelerator):
            logits = device.network.classify(device.method.features_of(batch, on_map=maps.__setitem__))
        yield maps, logits.float(), batch.labels


def _width(device: EdgeDevice, count: int, grid: bool) -> int:
    channels = [device.network.map_channels(name) for name in device.network.prefix.map_names[-count:]]
    return sum(channels) + 3 * channels[-1] * grid


def _describe(maps: dict[str, Tensor], count: int, grid: bool) -> Tensor:
    """As LightCLPlus.outputs_and_phi, for any choice of maps."""
    chosen = list(maps.values())[-count:]
    parts = [feature_map.float().mean((2, 3)) for feature_map in chosen[:-1]]
    return torch.cat([*parts, F.adaptive_avg_pool2d(chosen[-1].float(), 2 if grid else 1).flatten(1)], 1)


if __name__ == "__main__":
    main()
