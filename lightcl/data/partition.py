"""Which device holds which samples. Every training image belongs to at most one device.

A partition is computed once and kept in the cache as flat arrays: the indices of all devices, one device after the
other, and the offsets between them. They are memory-mapped, so that a device's share is read in constant time,
whatever the size of the fleet.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import overload

import numpy as np

from lightcl.data.images import UNREADABLE, Source, array_digest, remove_entry, return_freed_memory, write_entry
from lightcl.data.partitioners import NOBODY, Pool, even_sizes, find_partitioner
from lightcl.data.section import Fleet
from lightcl.errors import RequestError
from lightcl.plugins import from_plugin, source_digest
from lightcl.seeds import derive, numpy_generator
from lightcl.storage.files import cache_folder


@dataclass(frozen=True)
class Share:
    """One device's samples: sorted indices into the source's training and test split."""

    train: np.ndarray
    test: np.ndarray


@dataclass(frozen=True)
class Layout:
    """The indices of all devices, one after the other: device d's are `indices[offsets[d] : offsets[d + 1]]`."""

    indices: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, owners: np.ndarray, devices: int) -> Layout:
        """`owners` `[N]` is the device of each image, or NOBODY; a device's indices are sorted."""
        order = np.argsort(owners, kind="stable")
        sizes = np.bincount(owners[owners != NOBODY], minlength=devices)
        return cls(order[len(order) - sizes.sum() :], np.concatenate([[0], np.cumsum(sizes)]))

    def __getitem__(self, device: int) -> np.ndarray:
        return np.array(self.indices[self.offsets[device] : self.offsets[device + 1]], dtype=np.int64)

    def counts(self, labels: np.ndarray, classes: int) -> np.ndarray:
        """Images per device and class, int64 `[devices, classes]`."""
        devices = len(self.offsets) - 1
        owners = np.repeat(np.arange(devices), np.diff(self.offsets))
        flat = np.bincount(owners * classes + labels[self.indices], minlength=devices * classes)
        return flat.reshape(devices, classes)


class Shares(Sequence[Share]):
    """The shares of a fleet, each read on access."""

    def __init__(self, source: Source, fleet: Fleet, seed: int) -> None:
        """Opens the partition, or computes it if the cache has none. Raises RequestError as the partitioners do."""
        self._source, self._fleet, self._seed = source, fleet, seed
        folder = _entry(source, fleet, seed)
        try:
            self._train, self._test = _read(folder, fleet.devices)
        except UNREADABLE:
            _write(folder, source, fleet, seed)
            self._train, self._test = _read(folder, fleet.devices)

    @classmethod
    def tried(cls, source: Source, fleet: Fleet, seed: int) -> Shares:
        """A partition that is computed and not kept in the cache. Raises RequestError as the partitioners do."""
        shares = cls.__new__(cls)
        shares._source, shares._fleet, shares._seed = source, fleet, seed
        shares._train, shares._test = _layouts(source, fleet, seed)
        return shares

    def __len__(self) -> int:
        return self._fleet.devices

    @overload
    def __getitem__(self, index: int) -> Share: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Share]: ...
    def __getitem__(self, index: int | slice) -> Share | Sequence[Share]:
        if isinstance(index, slice):
            return [self[device] for device in range(*index.indices(len(self)))]
        device = range(len(self))[index]  # raises IndexError
        train = self._train[device]
        if self._fleet.test_data == "share":
            return Share(train, self._test[device])
        labels = self._source.train.labels[train]
        if self._fleet.test_data == "whole":
            return Share(train, _tests_of(labels, self._source.test.labels))
        return Share(train, self._matched_tests(labels, device))

    def train_of(self, device: int) -> np.ndarray:
        """A device's training images without its test images, which take time to draw under `test_data: matched`."""
        return self._train[device]

    def _matched_tests(self, train_labels: np.ndarray, device: int) -> np.ndarray:
        """Test images in the proportions of a device's training images, drawn for it; devices may share them."""
        available = self._tests_available
        counts = matched_counts(np.bincount(train_labels, minlength=len(available)), available, self._fleet.test_images)
        starts = np.cumsum(available) - available
        generator = numpy_generator(self._seed, "partition", "matched", device)
        drawn = [
            self._tests_by_class[starts[label] : starts[label] + available[label]][
                generator.permutation(int(available[label]))[: counts[label]]
            ]
            for label in np.flatnonzero(counts)
        ]
        return np.sort(np.concatenate(drawn)) if drawn else np.empty(0, dtype=np.int64)

    @cached_property
    def _tests_available(self) -> np.ndarray:
        """Test images per class, int64 `[classes]`."""
        return np.bincount(self._source.test.labels, minlength=len(self._source.classes))

    @cached_property
    def _tests_by_class(self) -> np.ndarray:
        """The test images of class 0, of class 1, ..."""
        return np.argsort(self._source.test.labels, kind="stable")

    @property
    def sizes(self) -> np.ndarray:
        """Training images per device, int64 `[devices]`."""
        return np.diff(self._train.offsets)

    def train_counts(self) -> np.ndarray:
        """Training images per device and class, int64 `[devices, classes]`; no share is read."""
        return self._train.counts(self._source.train.labels, len(self._source.classes))

    def label_counts(self) -> tuple[np.ndarray, np.ndarray]:
        """Training and test images per device and class, int64 `[devices, classes]` each; no share is read."""
        classes = len(self._source.classes)
        train = self.train_counts()
        available = self._tests_available
        if self._fleet.test_data == "share":
            return train, self._test.counts(self._source.test.labels, classes)
        if self._fleet.test_data == "whole":
            return train, np.where(train > 0, available, 0)
        return train, matched_counts(train, available, self._fleet.test_images)


def partition(source: Source, fleet: Fleet, seed: int) -> Shares:
    """One share per device. It depends only on the labels, the groups, the fleet section and the seed.

    Raises RequestError where the partition cannot be made.
    """
    return Shares(source, fleet, seed)


def share_of(source: Source, fleet: Fleet, seed: int, device: int) -> Share:
    """One device's share; those of other devices are not read."""
    return Shares(source, fleet, seed)[device]


def label_counts(source: Source, shares: Sequence[Share]) -> tuple[np.ndarray, np.ndarray]:
    """Training and test images per device and class, int64 `[devices, classes]` each."""
    if isinstance(shares, Shares):
        return shares.label_counts()
    classes = len(source.classes)
    test = [np.bincount(source.test.labels[share.test], minlength=classes) for share in shares]
    return train_counts(source, shares), np.stack(test) if test else np.zeros((0, classes), dtype=np.int64)


def train_counts(source: Source, shares: Sequence[Share]) -> np.ndarray:
    """Training images per device and class, int64 `[devices, classes]`."""
    if isinstance(shares, Shares):
        return shares.train_counts()
    classes = len(source.classes)
    train = [np.bincount(source.train.labels[share.train], minlength=classes) for share in shares]
    return np.stack(train) if train else np.zeros((0, classes), dtype=np.int64)


def matched_counts(train: np.ndarray, available: np.ndarray, limit: int | None = None) -> np.ndarray:
    """Test images per class in the proportions of the training images, as many as possible.

    `train` `[..., C]` counts a device's training images per class, `available` `[C]` the available test images. The
    class whose test images run out first contributes all of them and sets the scale for the others, which are rounded
    down; every class that a device holds and that has a test image gets at least one. Where the total exceeds `limit`,
    each count is scaled by limit / total and rounded down, but not below one.

    By hand: 30 and 10 training images, 100 test images each: 100 and ⌊10 · 100 / 30⌋ = 33. With a limit of 66 out of
    these 133: ⌊100 · 66 / 133⌋ = 49 and ⌊33 · 66 / 133⌋ = 16.
    """
    present = (train > 0) & (available > 0)
    per_image = np.where(present, available / np.maximum(train, 1), np.inf)
    scarce = np.argmin(per_image, axis=-1)[..., None]  # the class that runs out first
    most = np.take_along_axis(np.broadcast_to(available, train.shape), scarce, -1)
    least = np.maximum(np.take_along_axis(train, scarce, -1), 1)
    counts: np.ndarray = np.where(present, np.clip(train * most // least, 1, np.maximum(available, 1)), 0)
    if limit is not None:
        total = np.maximum(counts.sum(axis=-1, keepdims=True), limit)
        counts = np.where(counts > 0, np.maximum(counts * limit // total, 1), 0)
    return counts


def _tests_of(train_labels: np.ndarray, test_labels: np.ndarray) -> np.ndarray:
    """All test images of the classes that a device holds."""
    return np.flatnonzero(np.isin(test_labels, np.unique(train_labels)))


# -- computing and storing -----------------------------------------------------------------------------------------


def _entry(source: Source, fleet: Fleet, seed: int) -> Path:
    """The folder in the cache, named by a digest of everything that determines the partition."""
    parts = [source.train.labels_digest, source.test.labels_digest]
    if fleet.partition == "natural":
        parts += [array_digest(s.groups) for s in (source.train, source.test) if s.groups is not None]
    partitioner = find_partitioner(fleet.partition)
    if from_plugin(partitioner):
        parts.append(source_digest(partitioner))
    key = json.dumps([fleet.model_dump(mode="json", exclude={"test_data", "test_images"}), seed, parts, 5])
    return cache_folder() / "partitions" / hashlib.sha256(key.encode()).hexdigest()[:20]


def _read(folder: Path, devices: int) -> tuple[Layout, Layout]:
    """The layouts of the training and the test split, memory-mapped. Raises one of UNREADABLE."""
    layouts = []
    for split in ("train", "test"):
        layout = Layout(*(np.load(folder / f"{split}-{part}.npy", mmap_mode="r") for part in ("indices", "offsets")))
        if len(layout.offsets) != devices + 1 or layout.offsets[-1] != len(layout.indices):
            raise ValueError(f"{folder}: damaged")
        layouts.append(layout)
    return layouts[0], layouts[1]


def _write(folder: Path, source: Source, fleet: Fleet, seed: int) -> None:
    """Computes a partition and stores it; replaces an entry that cannot be read."""
    files: dict[str, np.ndarray | str] = {}
    for split, layout in zip(("train", "test"), _layouts(source, fleet, seed), strict=True):
        files |= {f"{split}-indices.npy": layout.indices, f"{split}-offsets.npy": layout.offsets}
    with suppress(*UNREADABLE):
        _read(folder, fleet.devices)
        return  # another process was first
    remove_entry(folder)
    write_entry(folder, files)
    return_freed_memory()


def _layouts(source: Source, fleet: Fleet, seed: int) -> tuple[Layout, Layout]:
    """The layouts of the training and the test split. Raises RequestError as the partitioners do."""
    owners = _train_owners(source, fleet, seed)
    tests = _test_owners(source, owners, fleet, seed)
    return Layout.of(owners, fleet.devices), Layout.of(tests, fleet.devices)


def _train_owners(source: Source, fleet: Fleet, seed: int) -> np.ndarray:
    """The device of every training image, int64 `[N]`, or NOBODY. Raises RequestError as the partitioners do."""
    split = source.train
    # The partitioners cut or assign the images in the given order, so the order is seeded here.
    order = numpy_generator(seed, "partition", "order").permutation(len(split))
    groups = None if split.groups is None else split.groups[order]
    pool = Pool(split.labels[order], groups, fleet, derive(seed, "partition") % 2**31)
    given = np.asarray(find_partitioner(fleet.partition)(pool))
    _check_owners(given, len(split), fleet)
    owners = np.empty(len(split), dtype=np.int64)
    owners[order] = given
    return owners


def _check_owners(owners: np.ndarray, images: int, fleet: Fleet) -> None:
    """Raises RequestError where a partitioner, of a plugin most likely, did not return a device per image."""
    wrong = None
    if owners.shape != (images,) or owners.dtype.kind not in "iu":
        wrong = f"{owners.dtype} of shape {list(owners.shape)}"
    elif images and not NOBODY <= owners.min() <= owners.max() < fleet.devices:
        wrong = f"devices {owners.min()} to {owners.max()}"
    if wrong is not None:
        raise RequestError(
            f"fleet.partition {fleet.partition!r}: the partitioner returned {wrong}, expected an integer per training "
            f"image [{images}]: a device from 0 to {fleet.devices - 1}, or {NOBODY} for an image that no device gets"
        )


def _test_owners(source: Source, owners: np.ndarray, fleet: Fleet, seed: int) -> np.ndarray:
    """The device of every test image: the images of a class are divided among the devices that train on the class.

    Where a class has fewer test images than such devices, devices drawn at random get one each.
    Under a natural partition, a test image belongs to the device that has its user's training images.
    """
    labels = source.test.labels
    given = owners != NOBODY
    tests = np.full(len(labels), NOBODY)
    for label in np.unique(labels):
        holders = np.unique(owners[given & (source.train.labels == label)])
        if len(holders):
            generator = numpy_generator(seed, "partition", "test", int(label))
            members = generator.permutation(np.flatnonzero(labels == label))
            if len(members) < len(holders):  # or the devices with the highest numbers would never be tested
                holders = generator.permutation(holders)[: len(members)]
            tests[members] = np.repeat(holders, even_sizes(len(members), len(holders)))
    if fleet.partition == "natural" and source.train.groups is not None and source.test.groups is not None:
        owner_of = np.full(len(source.train.group_names), NOBODY)
        owner_of[source.train.groups] = owners
        known = owner_of[source.test.groups]
        tests = np.where(known != NOBODY, known, tests)
    return tests
