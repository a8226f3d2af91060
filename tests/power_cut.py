"""A disk that forgets: records what a program does to the files of a folder, and makes what a power cut leaves of them.

`Recorder` stands below the code that stores something: it replaces `os.fsync`, `os.replace`, `os.unlink` and the like
for the time of a `with`, and finds everything else that was written, whoever wrote it (safetensors and SQLite do it in
Rust and C), by comparing the folder at each of these calls. `Disk.after_power_cut` then makes a state of the disk as
strict as POSIX: what was not synced may be there, lost, torn or reordered, sector by sector; a name that was made,
moved or removed may be there or not until its folder was synced; what was synced stays.
"""

from __future__ import annotations

import os
import sqlite3
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import pytest

SECTOR = 512
"""Bytes that a disk writes at once."""
ROOT = 0
"""The number of the recorded folder itself. Folders below it have negative numbers, files positive ones."""
NOT_ON_DISK = ("-shm", ".lock")
"""Ends of names whose content nobody needs after a power cut: SQLite's shared memory, and locks."""


@dataclass(frozen=True)
class Write:
    """Bytes at an offset of a file, within one sector."""

    file: int
    offset: int
    data: bytes


@dataclass(frozen=True)
class Cut:
    """A file gets this size."""

    file: int
    size: int


@dataclass(frozen=True)
class Names:
    """What names of a folder stand for from now on, at once; None: the name is gone."""

    folder: int
    changes: dict[str, int | None]


@dataclass(frozen=True)
class Sync:
    """All that was done to a file, or to the names in a folder, is on the disk."""

    what: int


@dataclass(frozen=True)
class Promise:
    """The program has said that this is saved."""

    what: Any


Operation = Write | Cut | Names | Sync | Promise
Tree = dict[str, bytes | None]
"""A folder's content by path; None: a folder."""


class Recorder:
    """The operations on the files below `folder`, in their order, from what is there at the beginning."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.operations: list[Operation] = []
        self._before: list[Operation] = []
        self._contents: dict[int, bytes] = {}
        self._names: dict[tuple[int, str], tuple[int, int]] = {}  # the file's number, and the system's for it
        self._folders: dict[int, Path] = {ROOT: folder}
        self._count = 0
        self._look()

    def promise(self, what: Any) -> None:
        """The program says that this is saved."""
        self._look()
        self.operations.append(Promise(what))

    def disk(self) -> Disk:
        """The disk before the first operation."""
        disk = Disk()
        for operation in self._before:
            disk.add(operation)
        return disk

    @contextmanager
    def recording(self) -> Iterator[Recorder]:
        self._look()
        there = [Sync(number) for number in range(-self._count, self._count + 1)]
        self._before, self.operations = [*self._before, *self.operations, *there], []
        real = {name: getattr(os, name) for name in ("replace", "rename", "unlink", "remove", "mkdir")}
        replaced: dict[str, Callable[..., Any]] = {
            name: partial(self._names_change, call) for name, call in real.items()
        }
        connect = partial(sqlite3.connect, factory=partial(_Connection, self))
        with patch.multiple(os, fsync=self._fsync, **replaced), patch.object(sqlite3, "connect", connect):
            yield self
        self._look()

    # -- what the program does ---------------------------------------------------------------------------------

    def _fsync(self, handle: int) -> None:
        """Does not sync: that would only take time."""
        self._look()
        number = self._number_of(os.fstat(handle))
        if number is not None:
            self.operations.append(Sync(number))

    def _names_change(self, call: Callable[..., Any], *paths: Any, **options: Any) -> Any:
        self._look()
        done = call(*paths, **options)
        self._look(expected=[Path(path).absolute() for path in paths if isinstance(path, (str, os.PathLike))])
        return done

    def committed(self, database: Path, *, synced: bool) -> None:
        """SQLite has finished a statement in this file: it syncs its log, and the folder where a name has changed."""
        log, begun = database.with_name(f"{database.name}-wal"), len(self.operations)
        self._look(expected=[log, database.with_name(f"{database.name}-journal")])
        named = [one for one in self.operations[begun:] if isinstance(one, Names)]
        new = any(name.startswith(database.name) for one in named for name in one.changes)
        for path in (database, log, *([database.parent] if new else [])) if synced else ():
            number = self._number_of(path.stat()) if path.exists() else None
            if number is not None:
                self.operations.append(Sync(number))

    def closed(self, database: Path) -> None:
        """SQLite has moved its log into the file, synced that, and removed the log."""
        number = self._number_of(database.stat())
        if number is not None:
            self._compare(number, database.read_bytes())
            self.operations.append(Sync(number))
        self.committed(database, synced=False)

    def _number_of(self, status: os.stat_result) -> int | None:
        if stat.S_ISDIR(status.st_mode):
            found = [number for number, path in self._folders.items() if path.stat().st_ino == status.st_ino]
            return found[0] if found else None
        return next((number for number, inode in self._names.values() if inode == status.st_ino), None)

    # -- what has changed since ----------------------------------------------------------------------------------

    def _look(self, expected: list[Path] | None = None) -> None:
        """Notes what is different from the last look. Names may only have gone or moved where that is `expected`."""
        for number in sorted(self._folders):
            self._look_into(number, expected)

    def _look_into(self, folder: int, expected: list[Path] | None) -> None:
        path = self._folders[folder]
        there = {one.name: one.stat() for one in os.scandir(path) if not one.name.endswith(NOT_ON_DISK)}
        known = {name: inode for (parent, name), (_, inode) in self._names.items() if parent == folder}
        inodes = {inode: self._names[folder, name][0] for name, inode in known.items()}
        changes: dict[str, int | None] = dict.fromkeys(known.keys() - there.keys())
        for name in changes:
            assert path / name in (expected or []), f"{path / name} has gone in a way that is not recorded"
            del self._names[folder, name]
        for name, status in there.items():
            if known.get(name) == status.st_ino:
                continue
            moved = bool(changes) and status.st_ino in inodes
            number = inodes[status.st_ino] if moved else self._new_number(status)
            self._names[folder, name] = number, status.st_ino
            changes[name] = number
        if changes:
            self.operations.append(Names(folder, changes))
        for name, status in there.items():
            number = self._names[folder, name][0]
            if not stat.S_ISDIR(status.st_mode):
                self._compare(number, (path / name).read_bytes())
            elif number not in self._folders:
                self._folders[number] = path / name
                self._look_into(number, expected)

    def _new_number(self, status: os.stat_result) -> int:
        self._count += 1
        return -self._count if stat.S_ISDIR(status.st_mode) else self._count

    def _compare(self, file: int, content: bytes) -> None:
        before = self._contents.get(file, b"")
        if content == before:
            return
        self._contents[file] = content
        if len(content) < len(before):
            self.operations.append(Cut(file, len(content)))
        for start in range(0, len(content), SECTOR):
            piece, old = content[start : start + SECTOR], before[start : start + SECTOR]
            if piece != old:
                kept = len(old) if piece.startswith(old) else 0  # an append leaves what stands before it alone
                self.operations.append(Write(file, start + kept, piece[kept:]))


class _Connection(sqlite3.Connection):
    """SQLite syncs by calls that Python does not see. It does so at each commit where `synchronous` is FULL (2)."""

    def __init__(self, recorder: Recorder, file: Path, *arguments: Any, **options: Any) -> None:
        super().__init__(file, *arguments, **options)
        self._recorder, self._file = recorder, Path(file)

    def _note(self, done: Any = None) -> Any:
        (level,) = super().execute("PRAGMA synchronous").fetchone()
        self._recorder.committed(self._file, synced=level >= 2 and not self.in_transaction)
        return done

    def execute(self, *arguments: Any) -> sqlite3.Cursor:
        return self._note(super().execute(*arguments))  # type: ignore[no-any-return]

    def executemany(self, *arguments: Any) -> sqlite3.Cursor:
        return self._note(super().executemany(*arguments))  # type: ignore[no-any-return]

    def executescript(self, *arguments: Any) -> sqlite3.Cursor:
        return self._note(super().executescript(*arguments))  # type: ignore[no-any-return]

    def __exit__(self, *reason: Any) -> Any:
        return self._note(super().__exit__(*reason))

    def close(self) -> None:
        super().close()
        self._recorder.closed(self._file)


# -- after the cut ---------------------------------------------------------------------------------------------------


@dataclass
class Disk:
    """What is on the disk for certain, and what was done since and may be."""

    contents: dict[int, bytes] = field(default_factory=dict)
    names: dict[int, dict[str, int]] = field(default_factory=dict)
    loose: list[Write | Cut | Names] = field(default_factory=list)
    promised: Any = None

    def add(self, operation: Operation) -> None:
        if isinstance(operation, Promise):
            self.promised = operation.what
        elif isinstance(operation, Sync):
            done = [one for one in self.loose if _target(one) == operation.what]
            self.loose = [one for one in self.loose if _target(one) != operation.what]
            _apply_(self.contents, self.names, done)
        else:
            self.loose.append(operation)

    def after_power_cut(self, draw: Random) -> Tree:
        """One of the states that a power cut may leave now."""
        contents, names = dict(self.contents), {folder: dict(known) for folder, known in self.names.items()}
        survives = draw.choice(WAYS)(draw, len(self.loose))
        kept, lost = [], []
        for number, one in enumerate(self.loose):
            (kept if survives(number, isinstance(one, Names)) else lost).append(one)
        _apply_(contents, names, kept)
        if draw.random() < 0.5:  # a file has its new size, and zeros or old bytes of the disk where none were written
            for one in lost:
                if isinstance(one, Write) and len(contents.get(one.file, b"")) < one.offset + len(one.data):
                    stale = draw.randbytes(len(one.data)) if draw.random() < 0.5 else bytes(len(one.data))
                    _apply_(contents, names, [Write(one.file, one.offset, stale)])
        return _tree(contents, names)


Survives = Callable[[int, bool], bool]
"""Whether the operation of this number, on names or on content, has reached the disk."""


def _up_to_some(draw: Random, count: int) -> Survives:
    """As a disk that keeps the order."""
    end = draw.randint(0, count)
    return lambda number, of_names: number < end


def _names_only(draw: Random, count: int) -> Survives:
    """As a file system that writes names first: a rename that has happened with nothing in the file."""
    return lambda number, of_names: of_names


def _contents_only(draw: Random, count: int) -> Survives:
    return lambda number, of_names: not of_names


def _nothing(draw: Random, count: int) -> Survives:
    return lambda number, of_names: False


def _any(draw: Random, count: int) -> Survives:
    share = draw.choice((0.1, 0.5, 0.9))
    drawn = [draw.random() < share for _ in range(count)]
    return lambda number, of_names: drawn[number]


WAYS: tuple[Callable[[Random, int], Survives], ...] = (_up_to_some, _names_only, _contents_only, _nothing, _any, _any)


def _target(operation: Write | Cut | Names) -> int:
    return operation.folder if isinstance(operation, Names) else operation.file


def _apply_(contents: dict[int, bytes], names: dict[int, dict[str, int]], done: list[Write | Cut | Names]) -> None:
    for one in done:
        if isinstance(one, Names):
            known = names.setdefault(one.folder, {})
            for name, number in one.changes.items():
                known.pop(name, None)
                if number is not None:
                    known[name] = number
        elif isinstance(one, Cut):
            contents[one.file] = contents.get(one.file, b"")[: one.size]
        else:
            before = contents.get(one.file, b"").ljust(one.offset, b"\0")
            contents[one.file] = before[: one.offset] + one.data + before[one.offset + len(one.data) :]


def _tree(contents: dict[int, bytes], names: dict[int, dict[str, int]], folder: int = ROOT, place: str = "") -> Tree:
    found: Tree = {}
    for name, number in names.get(folder, {}).items():
        path = f"{place}{name}"
        found[path] = None if number < 0 else contents.get(number, b"")
        if number < 0:
            found |= _tree(contents, names, number, f"{path}/")
    return found


def states(recorder: Recorder, draw: Random, per_point: int) -> Iterator[tuple[Any, Tree]]:
    """States after a power cut, each once, with what was promised by then: some before each operation that makes
    something certain or changes names, and at the end. Any part of what was written since may be there.
    """
    disk, known = recorder.disk(), set()
    for operation in [*recorder.operations, None]:
        for _ in range(0 if isinstance(operation, (Write, Cut)) else per_point):
            tree = disk.after_power_cut(draw)
            key = hash((disk.promised, *sorted(tree.items(), key=lambda item: item[0])))
            if key not in known:
                known.add(key)
                yield disk.promised, tree
        if operation is not None:
            disk.add(operation)


def put_back(tree: Tree, folder: Path) -> Path:
    """Makes a state of the disk in a new folder."""
    folder.mkdir(parents=True)
    for path, content in tree.items():  # folders come before what is in them
        if content is None:
            (folder / path).mkdir()
        else:
            (folder / path).write_bytes(content)
    return folder


@pytest.fixture
def in_memory(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where the system has one: thousands of states are made and removed."""
    memory = Path("/dev/shm")
    with TemporaryDirectory(dir=memory if memory.is_dir() else tmp_path) as folder:
        yield Path(folder)
