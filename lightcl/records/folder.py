"""The run folder: what was asked for, what happened, and where a killed run goes on.

run.json        scenario, versions, seeds, git commit, command
scenario.yaml   the scenario in full
partition.json  which device holds which sample
generalizability.json  with network.freeze: auto, what the freeze point was chosen from
rounds.jsonl    one row a round
devices.jsonl   one row a device and round; sorted by device; everything that depends on the clock is under "timing"
results.json    final figures; written last, so its presence means the run was completed
failure.json    instead of it: why the run stopped; a run that goes on has neither
server/         the server's state after the last finished round
devices/        the devices' states (of a simulation)
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightcl.errors import RequestError
from lightcl.records.rows import Row
from lightcl.scenario import Scenario
from lightcl.storage.files import LOCK, names_in, writable, write_atomically

ANALYSIS = "generalizability.json"
OWN = (
    "run.json", "scenario.yaml", "partition.json", "rounds.jsonl", "devices.jsonl", "results.json", "failure.json",
    "report.html", "plots", "server", "devices", ANALYSIS, LOCK,
)  # fmt: skip
"""Everything that may lie in a run folder. The lock is written first and removed last (see `names_in`)."""
_ROW_KEYS = {
    "rounds.jsonl": {"round", "task", "devices", "failed", "til", "cil", "bytes_down", "bytes_up", "timing"},
    "devices.jsonl": {"round", "device", "name", "task", "epochs", "bytes_down", "bytes_up", "timing"},
}


class RunFolder:
    """One run on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def exists(self) -> bool:
        with writable(self.path):
            return (self.path / "run.json").exists()

    @property
    def whole(self) -> bool:
        """Whether nothing is left to do: the run was completed, and without putting a device out."""
        results = self.results()
        return results is not None and not results["dropped"]

    def prepare(self, *, resume: bool, overwrite: bool) -> None:
        """Checks that the folder may be written to; nothing is touched unless `overwrite` empties it.

        Raises RequestError for an existing run without `resume` or `overwrite`, and for a folder of other files.
        """
        if resume and overwrite:
            raise RequestError("--resume and --overwrite: choose one")
        names = names_in(self.path, OWN, self.path / "run.json")
        if resume and not self.exists:
            raise RequestError(f"--resume: {self.path} holds no run")
        if self.exists and not resume and not overwrite:
            raise RequestError(f"--out: {self.path} holds a run; go on with --resume or replace it with --overwrite")
        if resume:
            self._check_rows()
            return
        if overwrite and self.exists:
            with self.held():  # not while another process writes to it
                (self.path / "run.json").unlink()  # first: a run that is half gone is none
        for name in OWN if names else ():  # also what a run left that was killed while it began
            shutil.rmtree(self.path / name, ignore_errors=True)
            (self.path / name).unlink(missing_ok=True)

    def _check_rows(self) -> None:
        """Raises RequestError where rows were lost by more than a kill: going on would forget what they told."""
        rounds = [row["round"] for row in self.rows("rounds.jsonl")]
        told = {row["round"] for row in self.rows("devices.jsonl")}
        whole = set(range(1, len(rounds) + 1))
        # The devices' rows of a round are written before its own; a kill may fall in between.
        if rounds != sorted(whole) or not whole <= told <= whole | {len(rounds) + 1}:
            raise RequestError(
                f"--resume: rows are missing: rounds.jsonl and devices.jsonl in {self.path} do not tell of the same "
                "rounds; put them back, or begin anew with --overwrite"
            )

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keeps a second process from writing to the same run. Raises RequestError."""
        with writable(self.path):
            lock = (self.path / LOCK).open("w")
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise RequestError(f"{self.path}: another process is at work on this run") from error
            yield

    def begin(
        self,
        scenario: Scenario,
        run: Mapping[str, Any],
        partition: Iterable[Mapping[str, Any]],
        analysis: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes what is known before the first round. run.json is last: a run exists once it is there.

        Raises RequestError where the folder cannot be written to.
        """
        about = {**run, "scenario": scenario.model_dump(mode="json")}
        with writable(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / LOCK).touch()
            write_atomically(self.path / "scenario.yaml", scenario.to_yaml())
            write_atomically(self.path / "partition.json", json.dumps(list(partition)))
            if analysis is not None:
                write_atomically(self.path / ANALYSIS, json.dumps(analysis, indent=2))
            write_atomically(self.path / "run.json", json.dumps(about, indent=2))

    def partition(self) -> dict[int, Row]:
        """Rows of partition.json by device; none where it cannot be read: no run depends on it."""
        try:
            rows = json.loads((self.path / "partition.json").read_text(encoding="utf-8"))
            return {row["device"]: row for row in rows}
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def note_own_data(self, devices: Collection[int]) -> None:
        """Corrects partition.json: what the server thought that these devices hold, they do not."""
        own = "all images of the board"
        rows = self.partition() | {device: {"device": device, "train": own, "test": own} for device in devices}
        write_atomically(self.path / "partition.json", json.dumps([rows[device] for device in sorted(rows)]))

    def read(self) -> Row:
        """run.json. Raises RequestError where there is none or it cannot be read."""
        try:
            values: Row = json.loads((self.path / "run.json").read_text())
        except (OSError, ValueError) as error:
            raise RequestError(f"{self.path} holds no readable run.json ({error})") from error
        if not isinstance(values, dict) or not isinstance(values.get("scenario"), dict):
            raise RequestError(f"{self.path / 'run.json'}: not the record of a run (it has no scenario)")
        return values

    def analysis(self) -> Row | None:
        """generalizability.json, or None where the freeze point was given. Raises RequestError for a broken file."""
        file = self.path / ANALYSIS
        if not file.exists():
            return None
        try:
            found: Row = json.loads(file.read_text())
            return found | {"freeze": str(found["freeze"])}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RequestError(f"{file}: not the record of an analysis ({error})") from error

    def append(self, name: str, rows: Iterable[Row]) -> None:
        """Adds rows to a .jsonl file, synced to disk."""
        with (self.path / name).open("a", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def rows(self, name: str) -> list[Row]:
        """All whole rows of a .jsonl file; a last line that a crash cut short is left out.

        Raises RequestError for any other line that is not a row.
        """
        file = self.path / name
        if not file.exists():
            return []
        rows = []
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except ValueError:
                row = None
                if number == len(lines):
                    break
            if not isinstance(row, dict) or not row.keys() >= _ROW_KEYS[name] or not isinstance(row["round"], int):
                raise RequestError(f"{file}, line {number}: not a row of a run")
            rows.append(row)
        return rows

    def forget_after(self, round_number: int) -> None:
        """Drops rows of rounds that were not finished when the run was killed; they will be written again."""
        for name in ("rounds.jsonl", "devices.jsonl"):
            kept = [row for row in self.rows(name) if row["round"] <= round_number]
            if (self.path / name).exists():
                write_atomically(self.path / name, "".join(json.dumps(row) + "\n" for row in kept))

    def reopen(self) -> None:
        """Takes back how the run had ended: it goes on, and only its new end says how."""
        for name in ("results.json", "failure.json"):
            (self.path / name).unlink(missing_ok=True)

    def finish(self, results: Mapping[str, Any]) -> None:
        write_atomically(self.path / "results.json", json.dumps(results, indent=2))

    def fail(self, reason: str, dropped: Mapping[str, str]) -> None:
        """Keeps why a run came to nothing; it is not completed, so it can be resumed."""
        content = {"status": "failed", "reason": reason, "dropped": dict(dropped)}
        write_atomically(self.path / "failure.json", json.dumps(content, indent=2))

    def failure(self) -> Row | None:
        """Why the run failed, or None. Raises RequestError for a broken file."""
        return self._read_end("failure.json")

    def results(self) -> Row | None:
        """Final figures, or None where the run has not come to its end. Raises RequestError for a broken file."""
        return self._read_end("results.json")

    def _read_end(self, name: str) -> Row | None:
        file = self.path / name
        if not file.exists():
            return None
        try:
            values: Row = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise RequestError(f"{file} cannot be read ({error})") from error
        if not isinstance(values, dict) or "dropped" not in values:
            raise RequestError(f"{file}: not what the end of a run is told by")
        return values
