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
stores. A segment's blocks are reserved when it is created, so that a full disk is noticed there. A deleted segment is
cut to length zero first, so that it takes no disk space in the processes that still have it open: they find its rows
absent, and open the file of this name anew when they write.
"""

from __future__ import annotations

import json
import os
import sys
import time
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightcl.storage.files import exclusive, write_atomically

SEGMENT_ROWS = 512
CHECKSUM_BYTES = 8
OPEN_SEGMENTS = 128
"""Files that all stores of a cache keep open together; a process may often have 1024."""
USE_SECONDS = 60.0
"""How exactly the last use of a segment is known; noting it at every read would be one system call per batch."""
_PRESENT = 1 << 32
"""Added to a row's CRC-32, so that no checksum of a row that is there is zero."""


def size_on_disk(images: int, row_bytes: int) -> int:
    """Bytes of a store with a row of `row_bytes` for every image: it grows by entire segments."""
    return -(-images // SEGMENT_ROWS) * SEGMENT_ROWS * (CHECKSUM_BYTES + row_bytes)


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
        self._segments: OrderedDict[tuple[str, int], _Segment] = OrderedDict()  # open, the last used at the end

    def __getstate__(self) -> dict[str, Any]:
        """A copy opens its own files: it would close those of the original."""
        return self.__dict__ | {"_segments": OrderedDict()}

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
                    _delete(file)
                    freed += stat.st_size if stat else 0
            with suppress(OSError):
                folder.rmdir()
        return freed

    def make_room(self, size: int) -> None:
        """Deletes the segments used least recently until `size` more bytes fit.

        Raises CacheFull where they never do.
        """
        if size > self.limit:
            raise CacheFull(f"one segment takes {size} bytes, but the cache may take only {self.limit}")
        files = [(s.st_mtime, s.st_size, file) for file in self.folder.glob("*/*.rows") if (s := _stat(file))]
        total = sum(length for _, length, _ in files)
        deleted = False
        for _, length, file in sorted(files):
            if total + size <= self.limit:
                break
            with suppress(OSError):
                _delete(file)
            total, deleted = total - length, True
        for name, segment in list(self._segments.items()) if deleted else ():
            if segment.unusable:
                del self._segments[name]

    def opened(self, key: str, number: int) -> _Segment | None:
        """Segment `number` of the store `key`, if it was opened less than `USE_SECONDS` ago."""
        segment = self._segments.get((key, number))
        if segment is None or time.monotonic() - segment.opened >= USE_SECONDS:
            return None
        self._segments.move_to_end((key, number))
        return segment

    def keep_open(self, key: str, number: int, segment: _Segment) -> None:
        """Keeps a segment open, instead of the one used least recently where there are too many."""
        self._segments[key, number] = segment
        if len(self._segments) > OPEN_SEGMENTS:
            self._segments.popitem(last=False)

    def drop(self, key: str, number: int) -> None:
        """Closes a segment if it is open, as soon as nobody reads it."""
        self._segments.pop((key, number), None)


class FeatureStore:
    """The outputs of one prefix for the images of one split under one view, by the image's row number."""

    def __init__(self, cache: PrefixCache, folder: Path, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        self._cache, self._folder, self.shape, self.dtype = cache, folder, shape, dtype
        self._key, self._row_bytes = folder.name, int(np.prod(shape)) * dtype.itemsize

    def read(self, rows: np.ndarray) -> tuple[Tensor, np.ndarray]:
        """Features `[N, C, H, W]` (channels-last) of `rows` `[N]`, and which of them are present, `[N]` boolean.

        The values of an absent row are arbitrary. Raises OSError where a segment is there and cannot be opened.
        """
        memory = torch.empty((len(rows), self._row_bytes), dtype=torch.uint8)
        found = memory.numpy()
        present = np.zeros(len(rows), dtype=bool)
        for number, positions in _by_segment(rows):
            segment = self._open(number)
            if segment is None:
                continue
            try:
                checksums = segment.checksums()
                for position, row in positions:
                    present[position] = segment.read(row, checksums[row], found[position])
            except OSError:  # a worn card, a file server that was restarted: the others are computed again
                self._cache.drop(self._key, number)
        return self._tensor(memory), present

    def present(self, row: int) -> bool:
        """Whether a row is there; a damaged one counts, until it is read. Raises OSError as `read`."""
        number, inside = divmod(int(row), SEGMENT_ROWS)
        segment = self._open(number)
        try:
            return segment is not None and segment.checksums(inside, 1)[0] != 0
        except OSError:
            self._cache.drop(self._key, number)
            return False

    def write(self, rows: np.ndarray, features: Tensor) -> None:
        """Stores `features` `[N, C, H, W]` under `rows` `[N]`.

        Raises CacheFull where there is no room, OSError where the disk fails.
        """
        stored = features.detach().to("cpu", self.dtype).permute(0, 2, 3, 1).contiguous()
        content = stored.view(torch.uint8).reshape(len(rows), self._row_bytes).numpy()
        for number, positions in _by_segment(rows):
            segment = self._open(number)
            if segment is not None and segment.unusable:
                self._cache.drop(self._key, number)
                segment = self._open(number)
            segment = segment or self._create(number)
            for position, row in positions:
                segment.write(row, content[position])

    def _tensor(self, content: Tensor) -> Tensor:
        channels, height, width = self.shape
        return content.view(self.dtype).view(-1, height, width, channels).permute(0, 3, 1, 2)

    @property
    def _segment_bytes(self) -> int:
        return size_on_disk(1, self._row_bytes)

    def _file(self, number: int) -> Path:
        return self._folder / f"{number:05d}.rows"

    def _open(self, number: int) -> _Segment | None:
        """An open segment; None where it is missing, or where its length says that it is damaged.

        Raises OSError where it is there and cannot be opened: it must not be replaced by an empty one.
        """
        segment = self._cache.opened(self._key, number)
        if segment is not None:
            return segment
        self._cache.drop(self._key, number)  # it may have been deleted, and created again by another process
        try:
            segment = _Segment(self._file(number), self._row_bytes, time.monotonic())
        except FileNotFoundError:
            return None
        if segment.size != self._segment_bytes:
            return None
        self._cache.keep_open(self._key, number, segment)
        return segment

    def _create(self, number: int) -> _Segment:
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


class _Segment:
    """An open segment file with rows of `row_bytes`.

    It is read and written by system calls: a map of the file would kill the process where another one cuts it short,
    and is slower for the few rows that a device has in a segment.
    """

    def __init__(self, file: Path, row_bytes: int, now: float) -> None:
        self._row_bytes, self.opened = row_bytes, now
        self._handle = os.open(file, os.O_RDWR | os.O_CLOEXEC)
        status = os.fstat(self._handle)
        self.size = status.st_size
        if time.time() - status.st_mtime > USE_SECONDS:
            os.utime(self._handle)

    @property
    def unusable(self) -> bool:
        """Whether the file has no name any more, or cannot be asked."""
        try:
            return os.fstat(self._handle).st_nlink == 0
        except OSError:
            return True

    def read(self, row: int, expected: int, target: np.ndarray) -> bool:
        """Reads a row into `target` `[row bytes]`; whether it is there, with this checksum, and undamaged."""
        if not expected:
            return False
        length = os.preadv(self._handle, [target.data], self._place(row))
        return length == self._row_bytes and _checksum(target) == expected

    def checksums(self, first: int = 0, count: int = SEGMENT_ROWS) -> Sequence[int]:
        """Of `count` rows, as they are now; 0 where a row is not there. Raises OSError."""
        found = os.pread(self._handle, count * CHECKSUM_BYTES, first * CHECKSUM_BYTES)
        return memoryview(found.ljust(count * CHECKSUM_BYTES, b"\0")).cast("Q")

    def write(self, row: int, content: np.ndarray) -> None:
        """Raises OSError."""
        os.pwrite(self._handle, content.data, self._place(row))
        os.pwrite(self._handle, _checksum(content).to_bytes(CHECKSUM_BYTES, sys.byteorder), row * CHECKSUM_BYTES)

    def _place(self, row: int) -> int:
        return SEGMENT_ROWS * CHECKSUM_BYTES + row * self._row_bytes

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            os.close(self._handle)


def _checksum(row: np.ndarray) -> int:
    return zlib.crc32(row.data) | _PRESENT


def _by_segment(rows: np.ndarray) -> Iterable[tuple[int, list[tuple[int, int]]]]:
    """Segment numbers, each with the positions in `rows` that lie in it and the rows inside the segment."""
    found: dict[int, list[tuple[int, int]]] = {}
    for position, row in enumerate(rows.tolist()):
        number, inside = divmod(row, SEGMENT_ROWS)
        found.setdefault(number, []).append((position, inside))
    return found.items()


def _delete(file: Path) -> None:
    """Raises OSError."""
    if file.suffix == ".rows":
        with suppress(OSError):
            os.truncate(file, 0)  # otherwise its blocks stay until the last process has closed it
    file.unlink()


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
