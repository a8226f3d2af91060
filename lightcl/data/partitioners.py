"""How training images are divided among devices, by name.

A partitioner gets the labels in a seeded order and returns the device of every image. Sizes and random draws are those
of the flwr-datasets 0.5 partitioners with the same names (the tests compare them), with three differences: a device
may get no images, so any number of devices works; the code is vectorized, so ten thousand devices take a second; and a
board needs no data-set library. A plugin adds a partitioner with `register_partitioner(name, partitioner)`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from lightcl.errors import RequestError, nearest
from lightcl.registry import Registry

NOBODY = -1
DIRICHLET_TRIES = 11
"""Draws that the Dirichlet partitioner of flwr-datasets makes before it accepts an empty device."""


class PartitionKeys(Protocol):
    """The keys of the scenario's section `fleet` that a partitioner may read."""

    @property
    def devices(self) -> int: ...
    @property
    def partition(self) -> str: ...
    @property
    def alpha(self) -> float: ...
    @property
    def sigma(self) -> float: ...
    @property
    def classes_per_device(self) -> int | None: ...


@dataclass(frozen=True)
class Pool:
    """The training images to divide, in a seeded order: `labels` `[N]` and, where known, `groups` `[N]`."""

    labels: np.ndarray
    groups: np.ndarray | None
    fleet: PartitionKeys
    seed: int

    @property
    def devices(self) -> int:
        return self.fleet.devices

    @property
    def classes(self) -> np.ndarray:
        """The classes that have images, sorted."""
        return np.unique(self.labels)


Partitioner = Callable[[Pool], np.ndarray]
"""Returns the device of every image of the pool, int64 `[N]`; `NOBODY` for an image that no device gets."""


def even_sizes(images: int, devices: int) -> np.ndarray:
    """Sizes of equal shares `[devices]`; where they do not divide evenly, the first ones get one more."""
    return images // devices + (np.arange(devices) < images % devices)


def iid(pool: Pool) -> np.ndarray:
    """Equal random shares."""
    return np.repeat(np.arange(pool.devices), even_sizes(len(pool.labels), pool.devices))


def linear(pool: Pool) -> np.ndarray:
    """Random shares whose sizes grow as 1, 2, 3, ..."""
    return _sized(pool, np.arange(1.0, pool.devices + 1))


def square(pool: Pool) -> np.ndarray:
    """Random shares whose sizes grow as 1, 4, 9, ..."""
    return _sized(pool, np.square(np.arange(1.0, pool.devices + 1)))


def exponential(pool: Pool) -> np.ndarray:
    """Random shares whose sizes grow as e, e², e³, ...: a few devices hold nearly everything."""
    ids = np.arange(1.0, pool.devices + 1)
    return _sized(pool, np.exp(ids if pool.devices <= 700 else ids - pool.devices))  # exp(710) is infinite


def _sized(pool: Pool, units: np.ndarray) -> np.ndarray:
    """Shares in proportion to `units` `[devices]`, rounded down; the last device gets the rest."""
    sizes = (units / units.sum() * len(pool.labels)).astype(np.int64)
    sizes[-1] += len(pool.labels) - sizes.sum()
    return np.repeat(np.arange(pool.devices), sizes)


def dirichlet(pool: Pool) -> np.ndarray:
    """Every class is divided by proportions drawn from Dir(`alpha`, ..., `alpha`) (Yurochkin et al. 2019).

    Repeats the draw, up to 11 times, while a device gets nothing; if that never helps, the first draw is used.
    """
    generator = np.random.default_rng(pool.seed)
    alphas = np.full(pool.devices, pool.fleet.alpha)
    members = [np.flatnonzero(pool.labels == label) for label in pool.classes]
    first: np.ndarray | None = None
    for _ in range(DIRICHLET_TRIES if pool.devices <= len(pool.labels) else 1):
        owners = np.empty(len(pool.labels), dtype=np.int64)
        for indices in members:
            cuts = (np.cumsum(generator.dirichlet(alphas)) * len(indices)).astype(int)[:-1]
            owners[indices] = np.searchsorted(cuts, np.arange(len(indices)), side="right")
        if np.bincount(owners, minlength=pool.devices).all():
            return owners
        first = owners if first is None else first
    assert first is not None
    return first


def inner_dirichlet(pool: Pool) -> np.ndarray:
    """Equal shares; each device draws its own class proportions from Dir(`alpha`, ..., `alpha`) (Acar et al. 2021).

    For each image, a device that is not full is drawn, then a class by that device's proportions. A class that has no
    images left gets proportion zero; a device without any class left draws from all classes that have images.
    """
    generator = np.random.default_rng(pool.seed)
    members = [np.flatnonzero(pool.labels == label) for label in pool.classes]
    left = np.array([len(indices) for indices in members])  # images per class
    priors = generator.dirichlet(np.full(len(members), pool.fleet.alpha), size=pool.devices)
    room = even_sizes(len(pool.labels), pool.devices)  # images that a device may still get
    owners = np.empty(len(pool.labels), dtype=np.int64)
    unfilled = list(range(pool.devices))
    dealt = 0
    while dealt < len(owners):
        place = int(generator.integers(0, len(unfilled)))
        device = unfilled[place]
        if room[device] == 0:
            unfilled.pop(place)
            continue
        room[device] -= 1
        while True:
            cumulated = priors[device].cumsum()
            label = int((cumulated / cumulated[-1]).searchsorted(generator.random(), side="right"))
            if left[label] > 0:
                break
            priors[:, label] = 0
            empty = priors.sum(axis=1) == 0
            priors[empty] = left > 0
            priors = priors / priors.sum(axis=1, keepdims=True)
        left[label] -= 1
        owners[members[label][left[label]]] = device
        dealt += 1
    return owners


def pathological(pool: Pool) -> np.ndarray:
    """Device d holds classes d, d+1, ... (`classes_per_device` of them, modulo the number of classes).

    A class is divided equally among the devices that hold it (McMahan et al. 2017, as in Li et al. 2022); where it has
    fewer images than devices, devices drawn at random get one each.
    """
    generator = np.random.default_rng(pool.seed)
    owners = np.full(len(pool.labels), NOBODY)
    for members, holders in _dealt_classes(pool):
        if len(members) < len(holders):  # random, or the devices with the highest numbers would always get nothing
            holders = generator.permutation(holders)[: len(members)]
        owners[members] = np.repeat(holders, even_sizes(len(members), len(holders)))
    return owners


def distribution(pool: Pool) -> np.ndarray:
    """The classes of `pathological`, divided by log-normal weights (Li et al. 2020, FedProx).

    A class is divided among its devices in proportion to weights exp(N(0, `sigma`²)), rounded down; one of its devices,
    drawn at random, gets the rest.
    """
    weights_of, generator = np.random.default_rng([pool.seed, 1]), np.random.default_rng(pool.seed)
    owners = np.full(len(pool.labels), NOBODY)
    for members, holders in _dealt_classes(pool):
        weights = weights_of.lognormal(0.0, pool.fleet.sigma, len(holders))
        sizes = np.floor(weights / weights.sum() * len(members)).astype(int)
        rest = len(members) - sizes.sum()
        owners[members] = np.append(
            np.repeat(holders, sizes), np.full(rest, holders[generator.integers(0, len(holders))])
        )
    return owners


def _dealt_classes(pool: Pool) -> list[tuple[np.ndarray, np.ndarray]]:
    """For every class that some device holds: its images, and its devices in ascending order."""
    classes, wanted = pool.classes, pool.fleet.classes_per_device or 1
    if wanted > len(classes):
        raise RequestError(
            f"fleet.partition {pool.fleet.partition!r}: fleet.classes_per_device is {wanted}, but data.source has "
            f"training images of {len(classes)} classes; lower fleet.classes_per_device or the number of classes that "
            "the stream needs"
        )
    devices = np.arange(pool.devices)
    dealt = []
    for number, label in enumerate(classes):
        holders = devices[(number - devices) % len(classes) < wanted]
        if len(holders):
            dealt.append((np.flatnonzero(pool.labels == label), holders))
    return dealt


def natural(pool: Pool) -> np.ndarray:
    """One device per user, writer or camera, in sorted order of their names (`partition_by` names the column).

    With fewer devices than groups, each device gets the same number of groups; surplus devices get nothing.
    """
    if pool.groups is None:
        raise RequestError(
            "fleet.partition 'natural' needs images with a user, writer or camera: use data.source: parquet, and name "
            "that column in fleet.partition_by"
        )
    groups, positions = np.unique(pool.groups, return_inverse=True)
    if pool.devices >= len(groups):
        return positions.astype(np.int64)
    return np.repeat(np.arange(pool.devices), even_sizes(len(groups), pool.devices))[positions]


_BUILT_IN: dict[str, Partitioner] = {
    "iid": iid,
    "dirichlet": dirichlet,
    "inner-dirichlet": inner_dirichlet,
    "pathological": pathological,
    "distribution": distribution,
    "linear": linear,
    "square": square,
    "exponential": exponential,
    "natural": natural,
}
PARTITIONERS: Registry[Partitioner] = Registry("partitioner", "fleet.partition")
"""All partitioners by name, including those of plugins."""
for _name, _partitioner in _BUILT_IN.items():
    PARTITIONERS.register(_name, _partitioner)


def register_partitioner(name: str, partitioner: Partitioner) -> None:
    """Makes a partitioner available as `fleet.partition: NAME`; a plugin that is loaded twice replaces its own entry.

    Raises RequestError for the name of a built-in partitioner and for a name that another plugin has registered.
    """
    if name in _BUILT_IN:
        raise RequestError(f"partitioner {name!r} is built in; register yours under another name")
    PARTITIONERS.register(name, partitioner)


def partitioner_names() -> tuple[str, ...]:
    """Names of all partitioners, built in and registered."""
    return tuple(PARTITIONERS)


def find_partitioner(name: str) -> Partitioner:
    """The partitioner of this name. Raises RequestError for an unknown one."""
    if name not in PARTITIONERS:
        raise RequestError(
            f"fleet.partition is {name!r}: unknown{nearest(name, PARTITIONERS)} (allowed: "
            f"{', '.join(PARTITIONERS)}, or one that a plugin registers)"
        )
    return PARTITIONERS[name]
