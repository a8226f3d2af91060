"""The server's state on disk: a SQLite database with one row per device and one row for the run, and a tensors file.

A save writes the shared tensors under a new name, then changes the database in one transaction: that is the commit.
Only rows of devices that have changed are written, so a save costs as much as a round has devices, whatever the size of
the fleet. A process killed at any point leaves the old state or the new one. Texts in the database begin with their
checksum, and the name of the tensors file is followed by the file's.

The tensors before the newest ones stay, with the rows as they were then (`run_before`, `devices_before`), for a run
whose newest file is damaged.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightcl.errors import RequestError
from lightcl.records.rows import DeviceRow
from lightcl.storage.files import checksum, sync, sync_names_above, text_checksum
from lightcl.storage.state import MANIFEST, UNNAMED, StateError
from server.ledger import Entry

DATABASE = "state.db"
VERSION = 1
"""Of the form of the database; raised where an older version of this project could not read it."""
RUN = """
    id INTEGER PRIMARY KEY CHECK (id = 0), round INTEGER NOT NULL, version INTEGER NOT NULL, tensors TEXT, pending TEXT
"""
SCHEMA = f"""
CREATE TABLE IF NOT EXISTS run ({RUN});
CREATE TABLE IF NOT EXISTS devices (number INTEGER PRIMARY KEY, entry TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS run_before ({RUN});
CREATE TABLE IF NOT EXISTS devices_before (number INTEGER PRIMARY KEY, entry TEXT);
"""
"""A device in `devices_before` without an entry had none."""
NEW_GENERATION = """
DELETE FROM run_before;
INSERT INTO run_before SELECT * FROM run;
DELETE FROM devices_before;
"""
GO_BACK = """
INSERT OR REPLACE INTO run SELECT * FROM run_before;
DELETE FROM devices WHERE number IN (SELECT number FROM devices_before);
INSERT INTO devices SELECT number, entry FROM devices_before WHERE entry IS NOT NULL;
DELETE FROM run_before;
DELETE FROM devices_before;
"""


class StateLost(StateError):
    """The saved state is damaged, or a part of it is missing."""


class TensorsLost(StateLost):
    """The newest shared tensors are damaged or missing, those before them are not; `pending`: within a round."""

    def __init__(self, text: str, *, pending: bool) -> None:
        super().__init__(text)
        self.pending = pending


@dataclass(frozen=True)
class PendingRound:
    """A round between training and testing: its devices' rows so far."""

    rows: dict[int, DeviceRow]
    training_seconds: float

    def to_json(self) -> dict[str, Any]:
        return {"rows": [row.to_json() for row in self.rows.values()], "training_seconds": self.training_seconds}

    @classmethod
    def from_json(cls, values: Mapping[str, Any], where: str) -> PendingRound:
        """Raises RequestError naming `where` and the field."""
        rows = [DeviceRow.from_json(row, where) for row in values["rows"]]
        return cls({row.device: row for row in rows}, values["training_seconds"])


@dataclass(frozen=True)
class Saved:
    """A saved point of a run. `entries` are the devices that have ever been chosen."""

    round: int
    pending: PendingRound | None
    version: int
    tensors: dict[str, Tensor]
    entries: list[Entry]


class Checkpoint:
    """The saved state of one run, in `folder`; one thread uses it, from the first call to `close`.

    `durable`: whether a save survives a power cut. Without it a save waits for no disk. It still survives every kill of
    the process; a power cut may cost the last rounds or damage the last tensors file, which is then refused.
    """

    def __init__(self, folder: Path, *, durable: bool = True) -> None:
        self.folder, self._durable = folder, durable
        self._connection: sqlite3.Connection | None = None

    def load(self) -> Saved | None:
        """The last saved point; None where nothing was ever saved.

        Raises StateLost where it is damaged, and TensorsLost where older tensors can help; StateError where another
        version wrote it.
        """
        if not (self.folder / DATABASE).exists():
            if (self.folder / MANIFEST).exists():
                raise StateError(
                    f"{self.folder}: the run was begun by an earlier version and cannot be continued; start it over "
                    "with --overwrite or in another folder"
                )
            return None
        try:
            (form,) = self._database.execute("PRAGMA user_version").fetchone()
            if form > VERSION:
                raise StateError(
                    f"{self.folder / DATABASE}: the state was saved by a newer version of lightcl-fleet (its form is "
                    f"{form}, this one knows {VERSION}); update lightcl-fleet, then continue with --resume"
                )
            (sound,) = self._database.execute("PRAGMA quick_check(1)").fetchone()
            if sound != "ok":
                raise ValueError(sound)
            run = self._database.execute("SELECT round, version, tensors, pending FROM run").fetchone()
            entries = self._database.execute("SELECT entry FROM devices ORDER BY number").fetchall()
            if run is None:
                return None
            if form < VERSION:
                raise ValueError("an earlier version of lightcl-fleet saved it")
            number, version, file, pending = run
            return Saved(
                number,
                PendingRound.from_json(json.loads(_checked(pending)), DATABASE) if pending else None,
                version,
                self._newest_tensors(file, pending=bool(pending)) if file else {},
                [Entry.from_saved(json.loads(_checked(entry))) for (entry,) in entries],
            )
        except (
            OSError, ValueError, TypeError, KeyError, AttributeError, sqlite3.Error, safetensors.SafetensorError,
            RequestError,
        ) as error:  # fmt: skip
            raise StateLost(f"{self.folder / DATABASE}: the saved state cannot be read ({error})") from error

    def go_back(self) -> None:
        """After TensorsLost: the point before the newest tensors is the last saved one."""
        with self._database:
            self._execute_all(GO_BACK)

    def use_older_tensors(self) -> None:
        """After TensorsLost: the tensors before the newest ones take their place, everything else stays."""
        with self._database:
            self._database.execute("UPDATE run SET tensors = (SELECT tensors FROM run_before)")

    def set_aside(self) -> None:
        """Renames a database that cannot be used any more, so that a new one can begin; it is kept."""
        self.close()
        for name in (DATABASE, f"{DATABASE}-wal", f"{DATABASE}-shm"):
            if (self.folder / name).exists():
                (self.folder / name).replace(self.folder / f"{name}.set-aside")

    def save(
        self,
        round_number: int,
        pending: PendingRound | None,
        version: int,
        tensors: Mapping[str, Tensor] | None,
        changed: Iterable[Entry],
    ) -> None:
        """Saves a point of the run in one transaction; `tensors=None` keeps the tensors of the last save.

        Raises StateError where the disk refuses it.
        """
        try:
            self._save(round_number, pending, version, tensors, changed)
        except (OSError, sqlite3.Error, safetensors.SafetensorError) as error:
            raise StateError(f"{self.folder}: the server's state cannot be saved ({error})") from error

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    # -- inside ------------------------------------------------------------------------------------------------

    def _save(
        self,
        round_number: int,
        pending: PendingRound | None,
        version: int,
        tensors: Mapping[str, Tensor] | None,
        changed: Iterable[Entry],
    ) -> None:
        database = self._database
        stored = database.execute("SELECT tensors FROM run").fetchone()
        file = str(stored[0]) if stored and stored[0] else None
        if tensors is not None:
            file = self._write(tensors, file) if tensors else None
        entries = [(entry.number, _with_checksum(json.dumps(entry.to_saved()))) for entry in changed]
        row = (round_number, version, file, _with_checksum(json.dumps(pending.to_json())) if pending else None)
        with database:  # commits, or rolls back
            database.execute(f"PRAGMA user_version = {VERSION}")
            if tensors:
                self._execute_all(NEW_GENERATION)
            database.executemany(
                "INSERT OR IGNORE INTO devices_before SELECT ?1, (SELECT entry FROM devices WHERE number = ?1) "
                "WHERE EXISTS (SELECT 1 FROM run_before)",
                [(number,) for number, _ in entries],
            )
            database.executemany("INSERT OR REPLACE INTO devices VALUES (?, ?)", entries)
            database.execute("INSERT OR REPLACE INTO run VALUES (0, ?, ?, ?, ?)", row)
        if tensors is not None:
            named = database.execute("SELECT tensors FROM run UNION SELECT tensors FROM run_before").fetchall()
            needed = {str(entry).partition(" ")[0] for (entry,) in named}
            for old in (*self.folder.glob("tensors-*.safetensors"), *self.folder.glob(UNNAMED)):
                if old.name not in needed:
                    old.unlink(missing_ok=True)

    def _execute_all(self, statements: str) -> None:
        """Within a transaction, which `executescript` would commit."""
        for statement in statements.split(";"):
            self._database.execute(statement)

    def _write(self, tensors: Mapping[str, Tensor], last: str | None) -> str:
        name = f"tensors-{int(last.split('-')[1].split('.')[0]) + 1 if last else 0}.safetensors"
        save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, self.folder / name)
        if self._durable:
            sync(self.folder / name)
            sync(self.folder)
        return f"{name} {checksum(self.folder / name):08x}"

    def _newest_tensors(self, stored: str, *, pending: bool) -> dict[str, Tensor]:
        """Raises TensorsLost where only those before them can be read."""
        try:
            return self._read_tensors(stored)
        except (OSError, ValueError, safetensors.SafetensorError) as error:
            before = self._database.execute("SELECT tensors FROM run_before").fetchone()
            if before is None:
                raise
            self._read_tensors(before[0])
            text = f"{self.folder}: the newest shared tensors cannot be read ({error})"
            raise TensorsLost(text, pending=pending) from error

    def _read_tensors(self, stored: str) -> dict[str, Tensor]:
        name, _, expected = stored.partition(" ")
        if expected and f"{checksum(self.folder / name):08x}" != expected:
            raise ValueError(f"{name} is damaged: its checksum is wrong")
        return load_file(self.folder / name)

    @property
    def _database(self) -> sqlite3.Connection:
        if self._connection is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self._durable and not (self.folder / DATABASE).exists():
                sync_names_above(self.folder)  # SQLite syncs the names in it
            connection = sqlite3.connect(self.folder / DATABASE)
            # A write-ahead log: one write per transaction. FULL waits for the disk at each, NORMAL at none of them.
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute(f"PRAGMA synchronous = {'FULL' if self._durable else 'NORMAL'}")
            connection.executescript(SCHEMA)
            self._connection = connection
        return self._connection


def _with_checksum(text: str) -> str:
    return f"{text_checksum(text):08x} {text}"


def _checked(stored: str) -> str:
    """The text behind its checksum. Raises ValueError where they do not fit."""
    expected, _, text = stored.partition(" ")
    if f"{text_checksum(text):08x}" != expected:
        raise ValueError("a row is damaged: its checksum is wrong")
    return text
