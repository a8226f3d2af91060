"""The run folder: the request, the record of the run, and the state from which a killed run continues.

run.json        scenario, versions, seeds, git commit, command
scenario.yaml   the scenario in full
partition.json  which device holds which sample, and the tasks that it skips
generalizability.json  with network.freeze: auto, the figures behind the freeze point
rounds.jsonl    one row per round
devices.jsonl   one row per device and round, sorted by device; everything that depends on the clock is under "timing"
events.jsonl    what happened when, one event per line (see server/listeners.py)
results.json    final figures; written last: a run that has it is completed
failure.json    why the run stopped before its end; a run in progress has neither file
server/         the server's state after the last finished round
devices/        the devices' states (of a simulation)
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from lightcl.errors import RequestError
from lightcl.records.rows import DeviceRow, Failure, Results, RoundRow
from lightcl.scenario import Scenario
from lightcl.storage.files import (
    LOCK,
    exclusive,
    names_in,
    saving,
    sync,
    sync_names_above,
    writable,
    write_atomically,
)

ANALYSIS = "generalizability.json"
ROUNDS, DEVICES, EVENTS = "rounds.jsonl", "devices.jsonl", "events.jsonl"
INTERRUPTED = "interrupted; continue with --resume"
"""The reason in the failure.json of a run that the user ended early."""
OWN_IMAGES = "all images of the board"
"""Entry in partition.json for a device with images of its own."""
OWN = (
    "run.json", "scenario.yaml", "partition.json", ROUNDS, DEVICES, EVENTS, "results.json", "failure.json",
    "report.html", "devices.csv", "plots", "server", "devices", ANALYSIS, LOCK,
)  # fmt: skip
"""All files and folders of a run folder. The lock is written first and removed last (see `names_in`)."""
Row = TypeVar("Row", DeviceRow, RoundRow)
End = TypeVar("End", Results, Failure)


class RunFolder:
    """One run on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def exists(self) -> bool:
        with writable(self.path):
            return (self.path / "run.json").exists()

    @property
    def completed(self) -> bool:
        """Whether the run is complete: it has results, and no device was dropped."""
        results = self.results()
        return results is not None and not results.dropped

    def prepare(self, *, resume: bool, overwrite: bool) -> None:
        """Checks that the folder may be written to; changes nothing, except that `overwrite` empties it.

        Raises RequestError for an existing run without `resume` or `overwrite`, and for a folder of other files.
        """
        if resume and overwrite:
            raise RequestError("--resume and --overwrite: choose one")
        names = names_in(self.path, OWN, self.path / "run.json")
        if resume and not self.exists:
            raise RequestError(f"--resume: {self.path} holds no run")
        if self.exists and not resume and not overwrite:
            raise RequestError(f"--out: {self.path} holds a run; continue with --resume or replace it with --overwrite")
        if resume:
            self._check_rows()
            return
        if overwrite and self.exists:
            with self.locked():  # not while another process writes to it
                (self.path / "run.json").unlink()  # first: without it, a partly removed run does not count as one
        for name in OWN if names else ():  # also removes what a run left that was killed at its start
            shutil.rmtree(self.path / name, ignore_errors=True)
            (self.path / name).unlink(missing_ok=True)

    def _check_rows(self) -> None:
        """Raises RequestError where more rows are missing than a kill can explain: a resumed run would lose them."""
        rounds = [row.round for row in self.rounds()]
        counted = Counter(row.round for row in self.devices())
        in_devices = set(counted)
        complete = set(range(1, len(rounds) + 1))
        # The device rows of a round are written before its own row; a kill may happen in between.
        fit = rounds == sorted(complete) and complete <= in_devices <= complete | {len(rounds) + 1}
        if not fit or any(counted[row.round] != row.devices for row in self.rounds()):
            raise RequestError(
                f"--resume: rows are missing: rounds.jsonl and devices.jsonl in {self.path} do not cover the same "
                "rounds; restore them, or start over with --overwrite"
            )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps a second process from writing to the same run. Raises RequestError."""
        with ExitStack() as stack:
            with writable(self.path):
                try:
                    stack.enter_context(exclusive(self.path, wait=False))
                except BlockingIOError as error:
                    raise RequestError(f"{self.path}: another process is working on this run") from error
            yield

    def begin(
        self,
        scenario: Scenario,
        run: Mapping[str, Any],
        partition: Iterable[Mapping[str, Any]],
        analysis: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes everything known before the first round. run.json comes last: with it, the run exists.

        Raises RequestError where the folder cannot be written to.
        """
        about = {**run, "scenario": scenario.model_dump(mode="json")}
        with writable(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            sync_names_above(self.path)
            (self.path / LOCK).touch()
            write_atomically(self.path / "scenario.yaml", scenario.to_yaml())
            write_atomically(self.path / "partition.json", json.dumps(list(partition), allow_nan=False))
            if analysis is not None:
                write_atomically(self.path / ANALYSIS, json.dumps(analysis, indent=2))
            write_atomically(self.path / "run.json", json.dumps(about, indent=2))

    def partition(self) -> dict[int, dict[str, Any]]:
        """Rows of partition.json by device; empty where it cannot be read, since no run depends on it."""
        try:
            rows = json.loads((self.path / "partition.json").read_text(encoding="utf-8"))
            return {row["device"]: row for row in rows}
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def note_own_data(self, devices: Collection[int], tasks: Mapping[int, Sequence[int]] | None = None) -> None:
        """Corrects partition.json: these devices hold images of their own, not shares of the scenario's partition.

        `tasks` are the learned tasks of devices that skip some.
        """
        own = {
            device: {"device": device, "train": OWN_IMAGES, "test": OWN_IMAGES}
            | ({"tasks": list(tasks[device])} if tasks and device in tasks else {})
            for device in devices
        }
        rows = self.partition() | own
        with saving(self.path / "partition.json"):
            write_atomically(self.path / "partition.json", json.dumps([rows[device] for device in sorted(rows)]))

    def read(self) -> dict[str, Any]:
        """run.json. Raises RequestError where there is none or it cannot be read."""
        try:
            values: dict[str, Any] = json.loads((self.path / "run.json").read_text())
        except (OSError, ValueError) as error:
            if not self.path.is_dir():
                what = "is a file" if self.path.exists() else "does not exist"
                raise RequestError(f"{self.path} {what}; name a run folder (--out of simulate or train)") from error
            raise RequestError(f"{self.path} holds no readable run.json ({error})") from error
        if not isinstance(values, dict) or not isinstance(values.get("scenario"), dict):
            raise RequestError(f"{self.path / 'run.json'}: not the record of a run (it has no scenario)")
        return values

    def analysis(self) -> dict[str, Any] | None:
        """generalizability.json; None if the scenario names the freeze point. Raises RequestError if broken."""
        file = self.path / ANALYSIS
        if not file.exists():
            return None
        try:
            found: dict[str, Any] = json.loads(file.read_text())
            return found | {"freeze": str(found["freeze"])}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RequestError(f"{file}: not the record of an analysis ({error})") from error

    def append(self, name: str, rows: Iterable[DeviceRow] | Iterable[RoundRow]) -> None:
        """Appends rows to a .jsonl file and syncs it. Raises Failure (lightcl/errors.py) where the disk refuses it."""
        path = self.path / name
        with saving(path):
            new = not path.exists()
            with path.open("a", encoding="utf-8") as file:
                for row in rows:
                    file.write(json.dumps(row.to_json(), allow_nan=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
            if new:
                sync(self.path)

    def rounds(self) -> list[RoundRow]:
        """The rows of rounds.jsonl. Lines at its end that a kill or a power cut left unfinished are ignored.

        Raises RequestError naming file, line and field for any other line that is not a row.
        """
        return [row for row, _ in self._read_rows(ROUNDS, RoundRow)]

    def devices(self) -> list[DeviceRow]:
        """The rows of devices.jsonl; as `rounds`."""
        return [row for row, _ in self._read_rows(DEVICES, DeviceRow)]

    def _read_rows(self, name: str, kind: type[Row]) -> list[tuple[Row, str]]:
        """Rows, each with its line of the file."""
        file = self.path / name
        if not file.exists():
            return []
        rows = []
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
        for number, line in enumerate(lines, 1):
            values = _parsed(line)
            if not isinstance(values, dict) and self._never_finished(name, lines[number:]):
                break
            rows.append((kind.from_json(values, f"{file}, line {number}"), line))
        return rows

    def _never_finished(self, name: str, rest: Sequence[str]) -> bool:
        """Whether a broken line and those behind it may be of an append that was cut off, so that nothing is lost.

        A power cut may also leave the end of what was appended without its beginning. A round's own row is appended
        alone, after those of its devices.
        """
        if not rest:
            return True
        unfinished = -1 if name == ROUNDS else len(self.rounds()) + 1
        later = (_parsed(line) for line in rest)
        return all(not isinstance(values, dict) or values.get("round") == unfinished for values in later)

    def forget_after(self, round_number: int) -> None:
        """Drops rows of rounds that were not finished when the run was killed; they are written again later.

        The last event is dropped, too, where it was cut short: the next one would follow it on its line.
        """
        _end_with_a_line_(self.path / EVENTS)
        rounds = [line for row, line in self._read_rows(ROUNDS, RoundRow) if row.round <= round_number]
        devices = [line for row, line in self._read_rows(DEVICES, DeviceRow) if row.round <= round_number]
        for name, kept in ((ROUNDS, rounds), (DEVICES, devices)):
            if (self.path / name).exists():
                with saving(self.path / name):
                    write_atomically(self.path / name, "".join(f"{line}\n" for line in kept))

    def reopen(self) -> None:
        """Removes results and failure of an earlier end: the run continues and will write new ones."""
        for name in ("results.json", "failure.json"):
            (self.path / name).unlink(missing_ok=True)
        sync(self.path)  # results that a power cut brings back would say that the run is complete

    def finish(self, results: Results) -> None:
        """Writes how the run ended. Raises Failure where the disk refuses it."""
        with saving(self.path / "results.json"):
            write_atomically(self.path / "results.json", json.dumps(results.to_json(), indent=2, allow_nan=False))

    def fail(self, failure: Failure) -> None:
        """Records why the run stopped; it is not complete, so it can be resumed."""
        write_atomically(self.path / "failure.json", json.dumps(failure.to_json(), indent=2))

    def interrupt(self, dropped: Mapping[int, str] | None = None) -> None:
        """Keeps that the user ended a run early, whatever else went wrong while it ended."""
        if not self.completed:
            self.fail(Failure(INTERRUPTED, dict(dropped or {})))

    def failure(self) -> Failure | None:
        """Why the run failed, or None. Raises RequestError for a broken file."""
        return self._read_end("failure.json", Failure)

    def results(self) -> Results | None:
        """Final figures, or None where the run is not completed. Raises RequestError for a broken file."""
        return self._read_end("results.json", Results)

    def _read_end(self, name: str, kind: type[End]) -> End | None:
        file = self.path / name
        if not file.exists():
            return None
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RequestError(f"{file} cannot be read ({error})") from error
        return kind.from_json(values, str(file))


def _parsed(line: str) -> object:
    """The value of a line; None where it is not JSON. A row is a dictionary, but a piece of one may be a number."""
    try:
        return json.loads(line)
    except ValueError:
        return None


def _end_with_a_line_(file: Path) -> None:
    """Cuts off what follows the last line end: half a line, or the zeros that a power cut leaves."""
    if not file.exists():
        return
    with file.open("r+b") as stream:
        size = end = stream.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - (1 << 16))
            stream.seek(start)
            found = stream.read(end - start).rfind(b"\n")
            if found >= 0:
                end = start + found + 1
                break
            end = start
        if end < size:
            stream.truncate(end)
