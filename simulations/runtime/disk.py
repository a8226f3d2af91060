"""How much disk space the states of a simulated fleet need, and whether the disk has it.

Everything is counted as a file system counts it: in blocks of 4 KiB, with a block for a device's folder.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lightcl.assembly import build_network
from lightcl.device.state import changing_tensors
from lightcl.errors import RequestError
from lightcl.exchange.tensors import shared_tensors
from lightcl.networks.staged import Backbone, FeatureMaps
from lightcl.scenario import Scenario

BLOCK = 4096
HEADER = 88
"""Bytes that a tensor takes in the header of a safetensors file: its name, type, shape and place."""
ROW = 22
"""Bytes of an accuracy in a manifest."""
MANIFEST = 1000
"""Bytes of a manifest without accuracies."""


@dataclass(frozen=True)
class DiskNeed:
    """Disk space for the states of a run, in bytes.

    `own` is what all devices keep when they have learned a task, together; `working` what one device keeps in addition
    from its training until it receives the average, `at_once` the number of devices that do so at a time; `shared` is
    the newest version of the shared tensors; `replaced` are old states while new ones are written.
    """

    devices: int
    own: int
    at_once: int = 0
    working: int = 0
    shared: int = 0
    replaced: int = 0
    kept: bool = True
    """Whether the states stay after the run (`simulation.keep_states`)."""

    @property
    def total(self) -> int:
        """The most that is needed at a time: at the end of a round's training."""
        return self.own + self.at_once * self.working + self.shared + self.replaced

    @property
    def afterwards(self) -> int:
        """What stays when the run is complete."""
        return self.own + self.shared if self.kept else 0

    def __str__(self) -> str:
        after = f"{_readable(self.afterwards)} afterwards" if self.kept else "nothing afterwards"
        return f"the states of {self.devices} devices take up to {_readable(self.total)} of disk, {after}"


@dataclass(frozen=True)
class _Tensors:
    """Some tensors of a state: their number, and their bytes together."""

    count: float
    size: float

    def __add__(self, other: _Tensors) -> _Tensors:
        return _Tensors(self.count + other.count, self.size + other.size)

    def __mul__(self, times: float) -> _Tensors:
        return _Tensors(self.count * times, self.size * times)

    @property
    def on_disk(self) -> int:
        return _blocks(self.size + self.count * HEADER) if self.count else 0


def disk_need(
    scenario: Scenario,
    *,
    image: tuple[int, int, int],
    classes: int,
    images: Sequence[int] | np.ndarray,
    tasks: Sequence[int],
) -> DiskNeed:
    """An estimate from the network's tensors, the optimizer's and what the method keeps; no device is made.

    Images are `image` = (H, W, C). `images[d]` and `tasks[d]` are the numbers of training images and of tasks of
    device d: a buffer holds no more images than there are, and a device without tasks has no state.
    """
    network = build_network(scenario, in_channels=image[2], classes=classes)
    changing = {name: tensor.numel() * tensor.element_size() for name, tensor in changing_tensors(network).items()}
    names = set(shared_tensors(network, scenario.server.aggregation)) & changing.keys()
    shared = _Tensors(len(names), sum(changing[name] for name in names))
    everything = _Tensors(len(changing), sum(changing.values()))
    trained = {name: p.numel() * p.element_size() for name, p in network.named_parameters() if p.requires_grad}
    weights = _Tensors(len(trained), sum(trained.values()))
    always = everything + shared * -1 + _always(scenario, network)
    own = 0
    for held, learned in zip(np.asarray(images).tolist(), np.asarray(tasks).tolist(), strict=True):
        if learned:
            kept = always + _kept(scenario, weights, classes, int(np.prod(image)), held, learned)
            rows = ROW * len(scenario.settings) * learned * (learned + 1) // 2
            own += BLOCK + kept.on_disk + _blocks(MANIFEST + rows)
    devices = int(np.count_nonzero(tasks))
    working, at_once = shared, min(devices, max(1, round(scenario.server.fraction * scenario.fleet.devices)))
    parts = scenario.server.rounds_per_task > 1
    if parts:  # between two parts of a task any number of devices keep all that their training needs
        copies = {"sgd": int(scenario.training.momentum > 0), "adam": 2, "adamw": 2}[scenario.training.optimizer]
        working, at_once = shared + weights * copies + _within_task(scenario, network, image, classes), devices
    state = own / max(1, devices) + working.on_disk * parts
    return DiskNeed(
        devices=devices,
        own=own,
        at_once=at_once,
        working=working.on_disk,
        shared=shared.on_disk,
        replaced=int(min(scenario.simulation.workers, devices) * state),
        kept=scenario.simulation.keep_states == "all",
    )


def _always(scenario: Scenario, network: Backbone) -> _Tensors:
    """What the method of every device keeps after any task."""
    method, cost = scenario.method.build(network), scenario.method.cost()
    begun = {name: tensor.numel() * tensor.element_size() for name, tensor in method.state_dict().items()}
    found = _Tensors(len(begun), sum(begun.values()))
    if scenario.method.sums_statistics:  # the fleet's head, which comes with the first average
        head = method.shared_head(method.statistics())
        found += _Tensors(len(head), sum(tensor.numel() * tensor.element_size() for tensor in head.values()))
    if cost.pattern_samples:  # a mask of vital channels per map
        maps = network.suffix.map_names
        found += _Tensors(len(maps), sum(network.map_channels(name) for name in maps))
    if cost.weight_sparsity:  # two boolean masks per weight
        masked = network.maskable_weights()
        found += _Tensors(2 * len(masked), 2 * sum(weight.numel() for weight in masked.values()))
    return found


def _within_task(scenario: Scenario, network: Backbone, image: tuple[int, int, int], classes: int) -> _Tensors:
    """What the method of a device keeps besides until its last task is finished: feature patterns."""
    cost, tasks = scenario.method.cost(), scenario.stream.tasks
    if not cost.pattern_samples:
        return _Tensors(0, 0)
    maps: FeatureMaps = {}
    with torch.no_grad():
        blank = torch.zeros(1, image[2], *image[:2], dtype=torch.uint8)
        features = network.eval().features(blank)
        network.classify(features, maps.__setitem__)
    vital = min(1.0, cost.vital_ratio * (tasks - 1)) * sum(values.numel() for values in maps.values())
    values = features.numel() * (2 if scenario.device.precision == "bf16" else 4) + 4 * (vital + classes)
    return _Tensors(len(maps) + 3, cost.pattern_samples * values)


def _kept(scenario: Scenario, weights: _Tensors, classes: int, image_bytes: int, images: int, tasks: int) -> _Tensors:
    """What the method of a device with so many images and tasks keeps in the end."""
    cost = scenario.method.cost()
    found = weights * (tasks - 1 if cost.columns else cost.weight_copies)
    buffer = min(cost.stored_images, images)
    if buffer:  # uint8 images, and two numbers of 64 bits per image
        found += _Tensors(3, buffer * (image_bytes + 16))
        found += _Tensors(1, min(cost.stored_logits, buffer) * classes * 4)
    return found


def check_disk(need: DiskNeed, folder: Path) -> None:
    """Raises RequestError where the disk of `folder` (or of its nearest folder that exists) has too little room.

    States that are there already, of a run that is resumed, are part of the need.
    """
    there = next(path for path in (folder, *folder.parents) if path.exists())
    stored = sum(_blocks(file.stat().st_size) for file in folder.glob("*/*/*.safetensors")) if folder.exists() else 0
    free = shutil.disk_usage(there).free
    if need.total - stored > free:
        raise RequestError(
            f"--out: {need}, but the disk of {there} has {_readable(free)} left; name another folder, use fewer "
            "fleet.devices, or set server.aggregation to suffix, which keeps the shared weights once"
        )


def _blocks(size: float) -> int:
    return -(-int(size) // BLOCK) * BLOCK


def _readable(size: float) -> str:
    for unit in ("bytes", "KB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
