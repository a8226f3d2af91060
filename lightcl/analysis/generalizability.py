"""Generalizability of every block: which blocks are general enough to be frozen.

LightCL (Wang et al., ASP-DAC 2025, arXiv 2407.10545) names two properties without saying how to measure them. This
project measures them with linear CKA (Kornblith et al., "Similarity of Neural Network Representations Revisited", ICML
2019):

    memory stability     MS[l, t] = CKA(F_l(x_old; θ_{t-1}), F_l(x_old; θ_t))
    learning plasticity  LP[l, t] = CKA(F_l(x_new; θ_t),     F_l(x_new; θ_t^free))
    readiness            R[l, t]  = CKA(F_l(x_new; θ_0),     F_l(x_new; θ_t^free))

θ_t has learned tasks 0..t by plain SGD with nothing frozen; θ_t^free has learned task t alone, from the same θ_0 and on
the same batches. F_l is block l's last feature map, with one row per position of every probe image. x_old are probe
images of the tasks before t, x_new of task t. All values are in [0, 1], for t = 1 .. T-1. Readiness does not affect the
choice of a freeze point: it says how close the pre-trained block already is to what training on the task would make it.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightcl.data.partition import Share
from lightcl.data.sources import Source
from lightcl.data.tasks import Samples, Task
from lightcl.device.device import EdgeDevice
from lightcl.errors import RequestError
from lightcl.methods.sgd import SGDParameters
from lightcl.networks.staged import Backbone
from lightcl.scenario import Scenario
from lightcl.seeds import numpy_generator

PROBES = 128
"""Probe images per task: its held-out images, and training images if those are too few."""
PROBE_BATCH = 32

OnStep = Callable[[str, int, int], None]
"""Called after every epoch with what is being trained, the epochs done, and the epochs in total."""


class LinearCKA:
    """Linear CKA between two representations of the same rows, added in batches.

        CKA(X, Y) = ‖YᵀX‖²_F / (‖XᵀX‖_F ‖YᵀY‖_F),   columns of X `[n, p]` and Y `[n, q]` centered

    Only sums of shape `[p + q, p + q]` are kept, in float64, whatever the number of rows.
    """

    def __init__(self) -> None:
        self._origin: Tensor | None = None
        self._rows = 0
        self._sum = torch.zeros(())
        self._products = torch.zeros(())

    def add(self, x: Tensor, y: Tensor) -> None:
        """Adds a batch of rows: `x` `[n, p]` and `y` `[n, q]`."""
        self._split = x.shape[1]
        both = torch.cat([x, y], 1).double()
        if self._origin is None:
            # Centering removes any constant. Subtracting the first row keeps sums small, and exactly 0 for constants.
            self._origin = both[0].clone()
        both -= self._origin
        self._rows += len(both)
        self._sum = self._sum.to(both) + both.sum(0)
        self._products = self._products.to(both) + both.T @ both

    def value(self) -> float:
        """In 0..1. If only one of the two varies, it is 0; if neither does, it is 1."""
        centered = self._products - torch.outer(self._sum, self._sum) / max(1, self._rows)
        p = self._split
        own, others = centered[:p, :p].norm(), centered[p:, p:].norm()
        if own == 0 or others == 0:
            return float(own == others)
        return float((centered[p:, :p].square().sum() / (own * others)).clamp(0, 1))


@torch.no_grad()
def block_similarity(one: Backbone, other: Backbone, batches: Iterable[Tensor]) -> dict[str, float]:
    """Linear CKA between two networks of the same shape at every block, over uint8 images `[N, C, H, W]`.

    Both run block by block in evaluation mode and fp32, so that only one map of each is in memory at a time.
    """
    one.eval()
    other.eval()
    similarities = {name: LinearCKA() for name in one.block_names}
    for images in batches:
        x = y = images
        for name, similarity in similarities.items():
            x, y = one.run_block(name, x), other.run_block(name, y)
            similarity.add(_positions(x), _positions(y))
    return {name: similarity.value() for name, similarity in similarities.items()}


def _positions(feature_map: Tensor) -> Tensor:
    """`[N, C, H, W]` -> `[N·H·W, C]`."""
    return feature_map.permute(0, 2, 3, 1).flatten(0, 2)


@dataclass(frozen=True)
class BlockFigures:
    """One block over the tasks 1 .. T-1; every figure is in 0..1."""

    stability: list[float]
    plasticity: list[float]
    readiness: list[float]


@dataclass(frozen=True)
class Generalizability:
    """The result of an analysis, block by block in the network's order."""

    device: int
    epochs: int
    blocks: dict[str, BlockFigures]
    tasks: tuple[int, ...]
    """The tasks of the figures: those that the device learns, without the first."""

    def freeze_point(self, threshold: float) -> str:
        """The last of the leading blocks that are general: MS and LP, as means over tasks, are at least `threshold`.

        "none" if the first block is not. The last block of the network is never chosen: a method needs something to
        train and to regularize, and a fleet something to share.
        """
        point = "none"
        for name, block in list(self.blocks.items())[:-1]:
            if min(fmean(block.stability), fmean(block.plasticity)) < threshold:
                break
            point = name
        return point

    def record(self, threshold: float) -> dict[str, Any]:
        """For generalizability.json."""
        return {
            "device": self.device,
            "epochs": self.epochs,
            "threshold": threshold,
            "freeze": self.freeze_point(threshold),
            "tasks": list(self.tasks),
            "blocks": {name: vars(block) for name, block in self.blocks.items()},
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Generalizability:
        """The inverse of `record`. Raises KeyError or TypeError for anything else."""
        blocks = {name: BlockFigures(**figures) for name, figures in record["blocks"].items()}
        return cls(record["device"], record["epochs"], blocks, tuple(record["tasks"]))


def analyzed_scenario(scenario: Scenario) -> Scenario:
    """The scenario that an analysis trains: plain SGD, nothing frozen, `network.analysis_epochs` per task.

    Raises RequestError for a stream of a single task, on which nothing can be forgotten.
    """
    if scenario.stream.tasks < 2:
        raise RequestError(
            "stream.tasks is 1, but memory stability is the effect of a second task on the first: at least 2 are needed"
        )
    epochs = min(scenario.network.analysis_epochs, scenario.training.epochs)
    return scenario.model_copy(
        update={
            "network": scenario.network.model_copy(update={"freeze": "none", "frozen_batch_norm": None}),
            "method": SGDParameters(loss_classes=scenario.method.loss_classes),
            "training": scenario.training.model_copy(update={"epochs": epochs}),
        }
    )


def first_analyzable(tasks: Sequence[Sequence[int]]) -> int:
    """The first device that learns at least two tasks; `tasks[d]` are those of device d.

    Raises RequestError where there is none.
    """
    for device, learned in enumerate(tasks):
        if len(learned) >= 2:
            return device
    raise RequestError(
        "network.freeze is 'auto', but no device learns two tasks, and memory stability is the effect of a second task "
        "on the first; name a block, or give the devices more images (fewer fleet.devices, a larger fleet.alpha)"
    )


def analyze(
    scenario: Scenario, number: int, source: Source, share: Share, on_step: OnStep | None = None
) -> Generalizability:
    """Trains device `number`'s stream and each task but the first on its own, and compares the networks by block.

    Takes about twice as long as training that device's stream with nothing frozen. Raises RequestError for a scenario
    that cannot be carried out and for a device that learns fewer than two tasks, TrainingFailure where a loss is no
    longer a number.
    """
    trained = analyzed_scenario(scenario)
    epochs = trained.training.epochs
    done = 0

    def learn(device: EdgeDevice, task: int, what: str) -> None:
        def epoch_done(*_: object) -> None:
            nonlocal done
            done += 1
            if on_step:
                on_step(what, done, (2 * len(ids) - 1) * epochs)

        device.train(task, epochs, epoch_done)

    rows: list[tuple[dict[str, float], dict[str, float], dict[str, float]]] = []
    with tempfile.TemporaryDirectory(prefix="lightcl-analysis-") as folder:
        device = EdgeDevice(trained, number, Path(folder, "stream"), source=source, share=share)
        ids = device.stream.ids
        if len(ids) < 2:
            raise RequestError(
                f"device {number} learns {len(ids)} of {trained.stream.tasks} tasks (for the others it has too few "
                "images), but memory stability is the effect of a second task on the first; name another --device"
            )
        start = copy.deepcopy(device.network)
        probes = [_probes(task, scenario.seed, number) for task in device.stream]
        learn(device, ids[0], f"task 1 of {len(ids)}")
        for position, task in enumerate(ids[1:], 1):
            before = copy.deepcopy(device.network)
            learn(device, task, f"task {position + 1} of {len(ids)}")
            free = EdgeDevice(trained, number, Path(folder, f"free-{task}"), source=source, share=share)
            free.skip_to(task)
            learn(free, task, f"task {position + 1} alone")
            old, new = probes[:position], probes[position : position + 1]
            rows.append(
                (
                    block_similarity(before, device.network, _batches(old, device.accelerator)),
                    block_similarity(device.network, free.network, _batches(new, device.accelerator)),
                    block_similarity(start, free.network, _batches(new, device.accelerator)),
                )
            )
    blocks = {
        name: BlockFigures(*([row[figure][name] for row in rows] for figure in range(3)))
        for name in device.network.block_names
    }
    return Generalizability(number, epochs, blocks, ids[1:])


def _probes(task: Task, seed: int, device: int) -> Samples:
    """Up to PROBES images of a task without augmentation, drawn by the scenario's seed, held-out ones first."""
    generator = numpy_generator(seed, "probes", device, task.id)
    unseen, seen = (generator.permutation(samples.indices) for samples in (task.held_out, task.train))
    return Samples(task.train.source, np.sort(np.concatenate([unseen, seen])[:PROBES]))


def _batches(probes: Sequence[Samples], device: torch.device) -> Iterable[Tensor]:
    for samples in probes:
        for batch in samples.batches(PROBE_BATCH):
            yield batch.images.to(device)
