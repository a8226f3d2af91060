"""What a board's node has taken from the server and not answered yet, so that a killed node continues with it.

Flower gives a message to a node once. Where the node is killed, the server learns of it when its heartbeats have been
missing for a minute, and the round goes on without the board. So the node writes down the message it works on and,
before it sends it, the reply; its successor on the same machine takes the dead node's place and goes on from there.

Files in the board's folder: `node.json` (who the node is at the server), `message` and `reply` (`Parcel`), `session`
(for the parts of a reply that the server knows of), `kills`, and `asking`, one byte that is 1 while a message may be on
its way. They are meant for a killed process, not for a power cut: after one the server has noticed. So nothing is
forced onto the disk, for the sake of an SD card.
"""

from __future__ import annotations

import json
import mmap
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from lightcl.storage.files import write_atomically

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_HEADER, _TREE = "header", "tree"


@dataclass(frozen=True)
class Parcel:
    """A Flower message as it is on the wire."""

    header: bytes
    """`flwr.proto.Message` without its content."""
    tree: bytes
    """`flwr.proto.ObjectTree`: the ids of its objects."""
    objects: dict[str, bytes] = field(default_factory=dict)
    """The content by object id."""

    def write(self, file: Path) -> None:
        """Replaces `file`: a reader, or a kill, sees the old parcel or this one."""
        temporary = file.with_name(f".{file.name}.partial")
        with zipfile.ZipFile(temporary, "w") as archive:
            for name, data in {_HEADER: self.header, _TREE: self.tree, **self.objects}.items():
                archive.writestr(name, data)
        temporary.replace(file)

    @classmethod
    def read(cls, file: Path) -> Parcel | None:
        """None where there is no file, or not what was written."""
        try:
            with zipfile.ZipFile(file) as archive:  # checks each part's CRC-32
                parts = {name: archive.read(name) for name in archive.namelist()}
            return cls(parts.pop(_HEADER), parts.pop(_TREE), parts)
        except (OSError, KeyError, zipfile.BadZipFile):
            return None


@dataclass(frozen=True)
class Unfinished:
    """The message under work and its reply, as far as they were written down."""

    message: Parcel | None
    reply: Parcel | None
    session: str
    """Of a reply that was announced to the server; else empty."""
    kills: int
    """How many nodes were killed while they worked on this message."""


class Journal:
    """The files of one board folder. `identity` says which server and key they belong to.

    A disk that takes no more files is no reason to stop work: the node then answers as one without a journal.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._message, self._reply, self._kills = folder / "message", folder / "reply", folder / "kills"
        self._node, self._session = folder / "node.json", folder / "session"
        self._identity = [identity, _boot(), folder.stat().st_ino]
        """A copy of the folder (a cloned SD card), or another start of this machine, is another node's."""
        self._asking = _mapped(folder / "asking")

    @property
    def node_id(self) -> int | None:
        """The node that a killed predecessor was; None where it left, or where there is none."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            values = json.loads(self._node.read_text())
            if values["identity"] == self._identity:
                return int(values["node_id"])
        return None

    def joined(self, node_id: int) -> None:
        """This process is a new node."""
        self.left()
        with suppress(OSError):
            write_atomically(
                self._node, json.dumps({"node_id": str(node_id), "identity": self._identity}), durable=False
            )

    def left(self) -> None:
        """The node has left the fleet: nothing of it is continued."""
        with suppress(OSError):
            self._node.unlink(missing_ok=True)
        self.finished()
        self._mark(False)

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Inside, the server may hand out a message that is not written down so far; an error leaves the mark."""
        self._mark(True)
        yield
        self._mark(False)

    def nothing_lost(self) -> None:
        """The server has noticed, or was never asked."""
        self._mark(False)

    @property
    def may_have_lost(self) -> bool:
        """Whether a message may have been lost on its way: nobody knows of it but the server."""
        return self._asking is None or self._asking[0] != 0

    def received(self, message: Parcel) -> None:
        """Where it cannot be written down, a successor is a new node, so that the server notices the loss."""
        if not self._write(message, self._message):
            with suppress(OSError):
                self._node.unlink(missing_ok=True)

    def replied(self, reply: Parcel) -> None:
        self._write(reply, self._reply)

    def announced(self, session: str) -> None:
        """The server knows of the reply, and waits for its parts in this session of Flower's."""
        with suppress(OSError):
            write_atomically(self._session, session, durable=False)

    def finished(self) -> None:
        """The server has the reply, or does not want it."""
        for file in (self._session, self._message, self._reply, self._kills):
            with suppress(OSError):
                file.unlink(missing_ok=True)

    def unfinished(self) -> Unfinished:
        """What a killed predecessor left; this call counts how often that has happened with this message."""
        message, reply = Parcel.read(self._message), Parcel.read(self._reply)
        kills, session = 0, ""
        with suppress(OSError):
            session = self._session.read_text()
        if message:
            with suppress(OSError, ValueError):
                kills = int(self._kills.read_text()) if self._kills.exists() else 0
            kills += 1
            with suppress(OSError):
                self._kills.write_text(str(kills))
        return Unfinished(message, reply, session, kills)

    def _write(self, parcel: Parcel, file: Path) -> bool:
        try:
            parcel.write(file)
        except OSError:
            with suppress(OSError):  # an older one must not be taken for it
                file.unlink(missing_ok=True)
            return False
        return True

    def _mark(self, asking: bool) -> None:
        if self._asking is not None:
            self._asking[0] = asking


def _boot() -> str:
    """Different after each start of the machine."""
    try:
        return _BOOT.read_text().strip()
    except OSError:
        return ""


def _mapped(file: Path) -> mmap.mmap | None:
    """The file's byte in memory: it is set several times a second, and the system writes it now and then."""
    try:
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            if os.fstat(handle).st_size != 1:
                os.ftruncate(handle, 0)
                os.write(handle, b"\0")
            return mmap.mmap(handle, 1)
        finally:
            os.close(handle)
    except (OSError, ValueError):
        return None
