"""Files that survive a crash: atomic writes, locks, and whether an output folder may be written to."""

from __future__ import annotations

import fcntl
import os
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from lightcl.errors import Failure, RequestError

LOCK = ".lock"
PIECE = 1 << 20
"""Bytes that are read at a time."""


def cache_folder() -> Path:
    """The folder for what is made once on this machine, such as decoded images and outputs of prefixes:
    `$LIGHTCL_CACHE`, else `~/.cache/lightcl`.

    Raises RequestError where there is no home folder either.
    """
    given = os.environ.get("LIGHTCL_CACHE")
    try:
        return Path(given) if given else Path.home() / ".cache" / "lightcl"
    except RuntimeError as error:
        raise RequestError("there is no home folder for the cache; set LIGHTCL_CACHE to a folder for it") from error


@contextmanager
def exclusive(folder: Path, *, wait: bool = True) -> Iterator[None]:
    """Keeps every other process out of `folder` inside a `with`; the system frees the lock of a process that dies.

    Without `wait`, raises BlockingIOError while another process is inside.
    """
    lock = _opened(folder / LOCK)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(lock)


def _opened(lock: Path) -> int:
    """The file, made with its folder where it is not there: a simulation opens one twice per device and round."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
    try:
        return os.open(lock, flags, 0o666)
    except FileNotFoundError:
        lock.parent.mkdir(parents=True, exist_ok=True)
        return os.open(lock, flags, 0o666)


@contextmanager
def writable(path: Path, option: str = "--out") -> Iterator[None]:
    """Turns an error of the disk (no permission, no room, too long a name) into a RequestError about the option."""
    try:
        yield
    except OSError as error:
        raise RequestError(f"{option}: {path} cannot be written to ({error.strerror})") from error


@contextmanager
def saving(file: Path) -> Iterator[None]:
    """Turns an error of the disk in the middle of a run, most often for lack of room, into a Failure."""
    try:
        yield
    except OSError as error:
        raise Failure(
            f"{file} cannot be written ({error.strerror or error}); make room on the disk, then continue with --resume"
        ) from error


def names_in(path: Path, own: Collection[str], begun: Path | None = None) -> list[str]:
    """What lies in an output folder. Raises RequestError for a file, and for a folder that is not ours.

    It is ours where `begun` is, the file that says what it holds; or where only names of `own` are, with the lock among
    them if it is one: it is written first, so without it somebody else's files have our names.
    """
    with writable(path):
        if path.exists() and not path.is_dir():
            raise RequestError(f"--out: {path} is a file, not a folder")
        # A killed process leaves at most a temporary file of `write_atomically`, which belongs to nobody.
        found = path.iterdir() if path.exists() else []
        names = sorted(file.name for file in found if not file.name.endswith(".partial"))
        foreign = [name for name in names if name not in own or (LOCK in own and LOCK not in names)]
        if foreign and not (begun and begun.exists()):
            raise RequestError(f"--out: {path} holds other files ({', '.join(foreign[:3])}); name another folder")
    return names


def write_atomically(file: Path, text: str, *, durable: bool = True) -> None:
    """Replaces a file so that a reader, or a crash, sees the old text or the new one.

    Without `durable` a killed process still loses nothing, but a power cut may lose the file.
    """
    # The name is this process's own: two that write the same file at once must not take each other's away.
    temporary = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        temporary.write_text(text, encoding="utf-8")
        if durable:
            sync(temporary)
        temporary.replace(file)
    except OSError:
        temporary.unlink(missing_ok=True)  # half a file on a full disk
        raise
    if durable:
        sync(file.parent)


def checksum(file: Path) -> int:
    """The CRC-32 of a file's content: every damage within four bytes changes it, any other but one in 2^32.

    A checksum against accidents, not against forgery. It reads the file piece by piece, 2 to 3 GB per second.
    """
    value = 0
    with file.open("rb", buffering=0) as handle:
        while piece := handle.read(PIECE):
            value = zlib.crc32(piece, value)
    return value


def text_checksum(text: str) -> int:
    """The CRC-32 of a text in UTF-8."""
    return zlib.crc32(text.encode())


def checksum_once(file: Path) -> int:
    """`checksum`, computed once per process for a file that many states refer to, unless its size or time changes."""
    return _checksum_of(*identity(file))


def identity(file: Path) -> tuple[Path, int, int, int]:
    """What is another for another file, and for a file that was written again; the path comes first. Raises OSError."""
    status = file.stat()
    return Path(os.path.normpath(file)), status.st_ino, status.st_mtime_ns, status.st_size


@lru_cache(maxsize=4)
def _checksum_of(file: Path, *_: int) -> int:
    return checksum(file)


def sync(path: Path) -> None:
    """Forces a file's content, or a folder's list of files, onto the disk before anything that follows."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_names_above(folder: Path) -> None:
    """Forces the names of a folder and of all folders above it onto the disk: any of them may be new.

    Without that a power cut may take a new folder away with all that was synced in it. It is done once per folder.
    """
    for above in folder.absolute().parents:
        try:
            sync(above)
        except PermissionError:  # somebody else's folder, which was there before
            return
