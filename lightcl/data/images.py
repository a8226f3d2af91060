"""Labeled images, a source of them, and the cache of decoded images.

Images are decoded once and kept as memory-mapped arrays in a cache folder, so that a thousand simulated devices share
one copy and a device reads only the pages of its own samples.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from lightcl.errors import RequestError
from lightcl.storage.files import cache_folder, sync

UNREADABLE = (OSError, ValueError, EOFError)
"""Errors raised on reading a cache entry that is missing, cut short or empty."""


@dataclass(frozen=True)
class ImageSet:
    """Images and their labels: `images` uint8 `[N, H, W, C]`, `labels` int64 `[N]` in 0..len(classes)-1.

    `groups` int64 `[N]` in 0..len(group_names)-1 is the user, writer or camera of each image, where the source knows
    it; natural partitions need it.
    """

    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    groups: np.ndarray | None = None
    group_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def labels_digest(self) -> str:
        """SHA-256 of the labels."""
        return array_digest(self.labels)

    @cached_property
    def images_digest(self) -> str:
        """SHA-256 of the images' shape and values."""
        total = hashlib.sha256(str(self.images.shape).encode())
        for block in self.blocks():
            total.update(block)
        return total.hexdigest()

    def blocks(self) -> Iterator[bytes]:
        """The images' values in blocks. A memory-mapped file is read instead: its pages would stay in memory."""
        images = self.images
        if isinstance(images, np.memmap) and images.flags.c_contiguous and images.filename is not None:
            with Path(images.filename).open("rb") as file:
                file.seek(images.offset)
                while block := file.read(1 << 20):
                    yield block
        else:
            for start in range(0, len(self), 1024):
                yield np.ascontiguousarray(images[start : start + 1024]).tobytes()

    def only(self, chosen: np.ndarray) -> ImageSet:
        """A new set of the chosen images (a mask `[N]` or indices)."""
        groups = None if self.groups is None else self.groups[chosen]
        return ImageSet(self.images[chosen], self.labels[chosen], self.classes, groups, self.group_names)


@dataclass(frozen=True)
class Source:
    """A labeled image data set, split into train and test; both splits have the same classes and group names."""

    train: ImageSet
    test: ImageSet

    @property
    def classes(self) -> tuple[str, ...]:
        return self.train.classes

    @property
    def channels(self) -> int:
        return int(self.train.images.shape[3])

    def names_digest(self, head: Sequence[int]) -> str:
        """Digest of the names of the classes that the rows of a head stand for, in their order."""
        return names_digest([self.classes[label] for label in head])


@dataclass(frozen=True)
class SourceRequest:
    """Everything that determines which images are read, and in which order."""

    name: str
    path: Path | None = None
    image_size: int | None = None
    image_column: str | None = None
    label_column: str | None = None
    test_fraction: float = 0.2
    seed: int = 0
    download: bool = True
    group_column: str | None = None
    """Parquet: the column that becomes `ImageSet.groups`."""


def names_digest(names: Sequence[str]) -> str:
    """Digest of class names in their order."""
    return hashlib.sha256(json.dumps(list(names)).encode()).hexdigest()[:16]


def array_digest(array: np.ndarray) -> str:
    """SHA-256 of an array's values."""
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def split_off_test(images: ImageSet, fraction: float, seed: int) -> Source:
    """Splits off a seeded test split with the same share of every class, for sources without one.

    Raises RequestError where one of the splits would be empty.
    """
    generator = np.random.default_rng([seed, 0x7E57])
    test = np.zeros(len(images), dtype=bool)
    for label in range(len(images.classes)):
        members = np.flatnonzero(images.labels == label)
        test[generator.permutation(members)[: round(len(members) * fraction)]] = True
    if test.all() or not test.any():
        raise RequestError(
            f"data.test_fraction: {fraction} of every class of {len(images)} images leaves no "
            f"{'training' if test.all() else 'test'} images; {'lower' if test.all() else 'raise'} it"
        )
    return Source(images.only(~test), images.only(test))


def iter_batches(images: ImageSet, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Consecutive batches `(images, labels)`; the last one may be smaller."""
    for start in range(0, len(images), size):
        yield images.images[start : start + size], images.labels[start : start + size]


# -- the cache -----------------------------------------------------------------------------------------------------


@contextmanager
def _caching() -> Iterator[None]:
    """Makes a RequestError of what the disk refuses to the cache: no right, no room, a file in its place."""
    try:
        yield
    except OSError as error:
        raise RequestError(
            f"the cache {cache_folder()} cannot be written to ({error.strerror or error}); set LIGHTCL_CACHE to a "
            "folder that can (decoded images and partitions are kept there)"
        ) from error


@contextmanager
def _temporary_beside(folder: Path) -> Iterator[str]:
    """A temporary folder on the same disk as `folder`; its parents are made."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        yield temporary


def write_entry(folder: Path, files: Mapping[str, np.ndarray | str]) -> None:
    """Writes arrays (`*.npy`) and texts into a new folder, atomically.

    The files are written into a temporary folder, synced and renamed, so that neither a killed or parallel process nor
    a power failure leaves a partial entry. An existing entry stays; remove an unreadable one first.
    """
    with _caching(), _temporary_beside(folder) as temporary:
        staging = Path(temporary) / "set"
        staging.mkdir()
        for name, content in files.items():
            if isinstance(content, str):
                (staging / name).write_text(content)
            else:
                np.save(staging / name, content)
        for file in (*staging.iterdir(), staging):
            sync(file)
        with suppress(OSError):  # another process was first; its result is the same
            staging.rename(folder)
        sync(folder.parent)


def return_freed_memory() -> None:
    """Returns what glibc keeps of freed memory to Linux: after decoding that may be a gigabyte, and the process may run
    for days."""
    with suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def remove_entry(folder: Path) -> None:
    """Removes an entry that cannot be read; other processes never see a part of it."""
    with _caching(), _temporary_beside(folder) as temporary, suppress(OSError):  # there is none
        folder.rename(Path(temporary) / "unreadable")


def read_source(folder: Path) -> Source:
    """The source in a cache entry, its images memory-mapped. Raises one of UNREADABLE."""
    classes = tuple(json.loads((folder / "classes.json").read_text()))
    names = folder / "groups.json"
    group_names = tuple(json.loads(names.read_text())) if names.exists() else ()
    return Source(
        *(
            ImageSet(
                np.load(folder / f"{split}-images.npy", mmap_mode="r"),
                np.load(folder / f"{split}-labels.npy"),
                classes,
                np.load(folder / f"{split}-groups.npy") if group_names else None,
                group_names,
            )
            for split in ("train", "test")
        )
    )


def write_source(folder: Path, source: Source) -> None:
    """Writes a source as a cache entry; replaces an entry that cannot be read."""
    files: dict[str, np.ndarray | str] = {}
    for split, images in (("train", source.train), ("test", source.test)):
        files |= {f"{split}-images.npy": images.images, f"{split}-labels.npy": images.labels}
        if images.groups is not None:
            files[f"{split}-groups.npy"] = images.groups
    files["classes.json"] = json.dumps(source.classes)
    if source.train.groups is not None:
        files["groups.json"] = json.dumps(source.train.group_names)
    try:
        read_source(folder)
    except UNREADABLE:
        remove_entry(folder)
    write_entry(folder, files)
