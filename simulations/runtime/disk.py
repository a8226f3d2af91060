"""How much disk space the states of a simulated fleet need, and whether the disk has it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from lightcl.assembly import build_network
from lightcl.device.state import changing_tensors
from lightcl.errors import RequestError
from lightcl.exchange.tensors import shared_tensors
from lightcl.scenario import Scenario

MANIFEST_BYTES = 4096
"""Estimate for a state's plain values: accuracies, position, report."""


@dataclass(frozen=True)
class DiskNeed:
    """Disk space for the states of a run, in bytes.

    `own` is per device; `shared` is additional, per device of a round, until it receives the average.
    """

    devices: int
    per_round: int
    own: int
    shared: int

    @property
    def total(self) -> int:
        """The maximum at any time: two rounds of `shared`, since some devices still link to an earlier version."""
        return self.devices * self.own + 2 * self.per_round * self.shared

    def __str__(self) -> str:
        return f"the states of {self.devices} devices take up to {_readable(self.total)} of disk"


def disk_need(scenario: Scenario, *, channels: int, classes: int, image_bytes: int) -> DiskNeed:
    """An upper estimate from the tensors of network and optimizer and the memory samples; no device is created.

    A method's own statistics (a few values per weight with some methods) are not counted.
    """
    network = build_network(scenario, in_channels=channels, classes=classes)
    tensors = {name: tensor.numel() * tensor.element_size() for name, tensor in changing_tensors(network).items()}
    names = set(shared_tensors(network, scenario.server.aggregation)) & tensors.keys()
    shared = sum(tensors[name] for name in names)
    training = scenario.training
    copies = {"sgd": int(training.momentum > 0), "adam": 2, "adamw": 2}[training.optimizer]
    memory = int(getattr(scenario.method, "memory_size", 0)) * image_bytes
    own = sum(tensors.values()) * (1 + copies) - shared + memory + MANIFEST_BYTES
    devices = scenario.fleet.devices
    return DiskNeed(devices, max(1, round(scenario.server.fraction * devices)), own, shared)


def check_disk(need: DiskNeed, folder: Path) -> None:
    """Raises RequestError where the disk of `folder` (or of its nearest folder that exists) has too little room.

    States that are there already, of a run that is resumed, are part of the need.
    """
    there = next(path for path in (folder, *folder.parents) if path.exists())
    files = [file.stat() for file in folder.glob("*/*/*.safetensors")] if folder.exists() else []
    stored = sum(file.st_size / file.st_nlink for file in files)  # many states link to one file
    free = shutil.disk_usage(there).free
    if need.total - stored > free:
        raise RequestError(
            f"--out: {need}, but the disk of {there} has {_readable(free)} left; name another folder, use fewer "
            "fleet.devices, or set server.aggregation to suffix, which keeps the shared weights once"
        )


def _readable(size: float) -> str:
    for unit in ("bytes", "KB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
