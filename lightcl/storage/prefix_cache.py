"""Outputs of a frozen prefix on disk, shared by all processes and devices that have the same prefix and images.

A store holds one row per image: the prefix's output for that image under one fixed view. It is named by digests of
everything that decides its content, so that a changed weight, image or transform names another store. Rows lie in
segment files of `SEGMENT_ROWS` rows:

    <folder>/<key>/about.json            what the digests stand for, for `lightcl cache ls`
    <folder>/<key>/00007.rows            checksums uint64 [SEGMENT_ROWS], then rows uint8 [SEGMENT_ROWS, row bytes]

Every row has a checksum, and a checksum of zero says that the row is absent. It is written after the row and compared
whenever the row is read. So two processes that write the same row at once, a killed process, and a damaged file all
lead to the same thing: a row that does not match counts as absent, and is computed again.

The size is bounded: before a segment is created, the segments that were used least recently are deleted, over all
stores. A segment's blocks are reserved when it is created, since a full disk under a memory map would kill the process.
"""

from __future__ import annotations

import json
import mmap
import os
import time
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightcl.storage.files import exclusive, write_atomically

SEGMENT_ROWS = 512
USE_SECONDS = 60.0
"""How exactly the last use of a segment is known; noting it at every read would be one system call per batch."""
_PRESENT = 1 << 32
"""Added to a row's CRC-32, so that no checksum of a row that is there is zero."""


class CacheFull(Exception):
    """The disk has no room for another segment, or the limit is smaller than one segment."""


@dataclass(frozen=True)
class StoreInfo:
    """One store on disk: `rows` present of what `about` describes, `size` in bytes, and the time of its last use."""

    key: str
    about: Mapping[str, Any]
    rows: int
    size: int
    used: float


class PrefixCache:
    """All stores below `folder`, `limit` bytes together at most."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit

    def store(
        self, key: str, shape: tuple[int, int, int], dtype: torch.dtype, about: Mapping[str, Any]
    ) -> FeatureStore:
        """The store named `key`, whose rows are outputs `shape` = (C, H, W) of type `dtype`; made where it is missing.

        Raises OSError where the folder cannot be written to.
        """
        folder = self.folder / key
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "about.json").exists():
            write_atomically(folder / "about.json", json.dumps(dict(about), indent=2), durable=False)
        return FeatureStore(self, folder, shape, dtype)

    def stores(self) -> list[StoreInfo]:
        """Every store, the most recently used first."""
        found = []
        for folder in self.folder.glob("*/") if self.folder.is_dir() else ():
            segments = [s for file in folder.glob("*.rows") if (s := _stat(file))]
            try:
                about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
            except (OSError, ValueError):
                about = {}
            rows = sum(_present_rows(file) for file in folder.glob("*.rows"))
            size, used = sum(s.st_size for s in segments), max((s.st_mtime for s in segments), default=0.0)
            found.append(StoreInfo(folder.name, about, rows, size, used))
        return sorted(found, key=lambda store: -store.used)

    def clear(self, key: str | None = None) -> int:
        """Deletes one store, or all of them; returns the number of bytes that became free."""
        freed = 0
        for folder in self.folder.glob(f"{key or '*'}/") if self.folder.is_dir() else ():
            for file in (*folder.glob("*.rows"), *folder.glob(".*"), folder / "about.json"):
                stat = _stat(file)
                with suppress(OSError):
                    file.unlink()
                    freed += stat.st_size if stat else 0
            with suppress(OSError):
                folder.rmdir()
        return freed

    def make_room(self, size: int) -> None:
        """Deletes the segments used least recently until `size` more bytes fit. Raises CacheFull where they never do.

        A process that has mapped a deleted segment keeps its pages until it lets go of them.
        """
        if size > self.limit:
            raise CacheFull(f"one segment takes {size} bytes, but the cache may take only {self.limit}")
        files = [(s.st_mtime, s.st_size, file) for file in self.folder.glob("*/*.rows") if (s := _stat(file))]
        total = sum(length for _, length, _ in files)
        for _, length, file in sorted(files):
            if total + size <= self.limit:
                return
            with suppress(OSError):
                file.unlink()
            total -= length


class FeatureStore:
    """The outputs of one prefix for the images of one split under one view, by the image's row number."""

    def __init__(self, cache: PrefixCache, folder: Path, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        self._cache, self._folder, self.shape, self.dtype = cache, folder, shape, dtype
        self._row_bytes = int(np.prod(shape)) * dtype.itemsize
        self._segments: dict[int, np.ndarray] = {}
        self._used: dict[int, float] = {}

    def read(self, rows: np.ndarray) -> tuple[Tensor, np.ndarray]:
        """Features `[N, C, H, W]` (channels-last) of `rows` `[N]`, and which of them are present, `[N]` boolean.

        The values of an absent row are arbitrary.
        """
        memory = torch.empty((len(rows), self._row_bytes), dtype=torch.uint8)
        found = memory.numpy()
        present = np.zeros(len(rows), dtype=bool)
        for number, positions in _by_segment(rows):
            segment = self._open(number)
            if segment is None:
                continue
            checksums, content = self._parts(segment)
            for position in positions:
                row = int(rows[position]) % SEGMENT_ROWS
                expected = int(checksums[row])
                if expected:
                    found[position] = content[row]
                    present[position] = _checksum(found[position]) == expected
        return self._tensor(memory), present

    def write(self, rows: np.ndarray, features: Tensor) -> None:
        """Stores `features` `[N, C, H, W]` under `rows` `[N]`.

        Raises CacheFull where there is no room, OSError where the disk fails.
        """
        stored = features.detach().to("cpu", self.dtype).permute(0, 2, 3, 1).contiguous()
        content = stored.view(torch.uint8).reshape(len(rows), self._row_bytes).numpy()
        for number, positions in _by_segment(rows):
            segment = self._open(number)
            if segment is None:
                segment = self._create(number)
            checksums, target = self._parts(segment)
            for position in positions:
                row = int(rows[position]) % SEGMENT_ROWS
                target[row] = content[position]
                checksums[row] = _checksum(content[position])

    def _tensor(self, content: Tensor) -> Tensor:
        channels, height, width = self.shape
        return content.view(self.dtype).view(-1, height, width, channels).permute(0, 3, 1, 2)

    def _parts(self, segment: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The checksums `[SEGMENT_ROWS]` and the rows `[SEGMENT_ROWS, row bytes]` of a segment."""
        cut = 8 * SEGMENT_ROWS
        return segment[:cut].view(np.uint64), segment[cut:].reshape(SEGMENT_ROWS, self._row_bytes)

    @property
    def _segment_bytes(self) -> int:
        return SEGMENT_ROWS * (8 + self._row_bytes)

    def _file(self, number: int) -> Path:
        return self._folder / f"{number:05d}.rows"

    def _open(self, number: int) -> np.ndarray | None:
        """A segment, mapped; None where it is missing, or where its length says that it is damaged."""
        file, now = self._file(number), time.monotonic()
        if number in self._segments and now - self._used[number] < USE_SECONDS:
            return self._segments[number]
        self._segments.pop(number, None)  # it may have been deleted, and created again by another process
        stat = _stat(file)
        if stat is None or stat.st_size != self._segment_bytes:
            return None
        try:
            os.utime(file)
            with file.open("r+b") as handle:  # np.memmap takes longer, also for each row
                segment = np.frombuffer(mmap.mmap(handle.fileno(), self._segment_bytes), dtype=np.uint8)
        except (OSError, ValueError):
            return None
        self._segments[number], self._used[number] = segment, now
        return segment

    def _create(self, number: int) -> np.ndarray:
        file = self._file(number)
        with exclusive(self._cache.folder):
            segment = self._open(number)  # another process may have been faster
            if segment is not None:
                return segment
            self._cache.make_room(self._segment_bytes)
            self._folder.mkdir(parents=True, exist_ok=True)
            temporary = file.with_name(f".{file.name}.partial")
            try:
                with temporary.open("wb") as handle:
                    os.posix_fallocate(handle.fileno(), 0, self._segment_bytes)
                temporary.replace(file)
            except OSError as error:
                with suppress(OSError):
                    temporary.unlink()
                raise CacheFull(f"{file}: no room for {self._segment_bytes} bytes ({error.strerror})") from error
        segment = self._open(number)
        if segment is None:  # deleted by another process since
            raise CacheFull(f"{file}: was deleted while it was being created")
        return segment


def _checksum(row: np.ndarray) -> int:
    return zlib.crc32(row.data) | _PRESENT


def _by_segment(rows: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """Segment numbers, each with the positions in `rows` that lie in it."""
    numbers = rows // SEGMENT_ROWS
    return [(int(number), np.flatnonzero(numbers == number)) for number in np.unique(numbers)]


def _stat(file: Path) -> os.stat_result | None:
    try:
        return file.stat()
    except OSError:
        return None


def _present_rows(file: Path) -> int:
    try:
        return int((np.fromfile(file, dtype=np.uint64, count=SEGMENT_ROWS) != 0).sum())
    except OSError:
        return 0
