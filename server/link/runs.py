"""The runs that were asked for, one file each: what a restarted server continues."""

from __future__ import annotations

import json
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from lightcl.errors import RequestError
from lightcl.storage.files import exclusive
from server.link.folder import ServerFolder, write_private
from server.link.progress import Progress

if TYPE_CHECKING:
    from lightcl.scenario import Scenario

MOST_FAILURES = 3
"""Starts of a run that end without a result and without a finished round between them; then it is given up."""
PAUSES_SECONDS = (0.0, 10.0, 60.0)
"""Before the next start, by the number of failures so far."""
State = Literal["waiting", "going", "done", "failed"]


@dataclass(frozen=True)
class Run:
    """`flower` is Flower's number of the last start; `failures` and `rounds` as in `after_end`."""

    number: int
    given: str
    """What the user asked for, for lists and errors."""
    out: str
    asked: str
    state: State = "waiting"
    flower: str = ""
    starts: int = 0
    failures: int = 0
    rounds: int = 0
    reason: str = ""
    changes: list[str] = field(default_factory=list)

    @property
    def open(self) -> bool:
        return self.state in ("waiting", "going")

    @property
    def progress(self) -> Progress:
        return Progress(Path(self.out))

    def after_end(self, rounds: int, reason: str) -> Run:
        """The run after a start that ended without a result, when `rounds` of its rounds are finished.

        Failures count from the last finished round on: a run that gets further is started again without end.
        """
        failures = 1 if rounds > self.rounds else self.failures + 1
        state: State = "failed" if failures >= MOST_FAILURES else "waiting"
        return replace(self, state=state, failures=failures, rounds=max(rounds, self.rounds), reason=reason)

    @property
    def pause(self) -> float:
        """Seconds before it may start again."""
        return PAUSES_SECONDS[min(self.failures, len(PAUSES_SECONDS) - 1)]

    @classmethod
    def read(cls, file: Path) -> Self:
        try:
            return cls(**json.loads(file.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise RequestError(f"{file} cannot be read ({error}); delete it to forget this run") from error


class Runs:
    """The runs of a server's folder."""

    def __init__(self, folder: ServerFolder) -> None:
        self._files = folder.path / "runs"

    def all(self) -> list[Run]:
        """In the order in which they were asked for."""
        return [Run.read(file) for file in sorted(self._files.glob("[0-9]*.json"))]

    def save(self, run: Run) -> None:
        write_private(self._file(run, "json"), json.dumps(asdict(run), indent=2))

    def scenario_file(self, run: Run) -> Path:
        return self._file(run, "yaml")

    def ask(self, given: str, changes: list[str], scenario: Scenario, out: Path) -> tuple[Run, str]:
        """Remembers a run, or opens the one in `out` again; returns it and what to say. Raises RequestError."""
        from lightcl.records.folder import RunFolder

        out, text = out.absolute(), scenario.to_yaml()
        with exclusive(self._files):
            before = next((run for run in self.all() if run.out == str(out)), None)
            if before and self.scenario_file(before).read_text() != text:
                raise RequestError(
                    f"--out: {out} holds run {before.number} ({before.given}), which is another scenario; name another "
                    "folder"
                )
            if before and before.progress.complete:
                return before, f"run {before.number} is complete already: {out}"
            if before and before.open:
                return before, f"run {before.number} continues: {out}"
            if before:
                again = replace(before, state="waiting", failures=0, reason="")
                self.save(again)
                return again, f"run {again.number} is tried again: {out}"
            RunFolder(out).prepare(resume=RunFolder(out).exists, overwrite=False)
            number = 1 + max((run.number for run in self.all()), default=0)
            now = datetime.now(UTC).isoformat(timespec="seconds")
            run = Run(number, given, str(out), now, changes=changes)
            write_private(self.scenario_file(run), text)
            self.save(run)
        return run, f"run {number} is waiting for its turn: {out}"

    def _file(self, run: Run, kind: str) -> Path:
        return self._files / f"{run.number:04d}.{kind}"


def ask_apart(folder: ServerFolder, given: Path, changes: list[str], out: Path | None) -> str:
    """Checks a request and remembers it (`prepare`, `Runs.ask`), in a process of its own: it loads PyTorch.

    Returns what to say. Raises RequestError.
    """
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as apart:
        return apart.submit(_ask, folder, given, changes, out).result()


def _ask(folder: ServerFolder, given: Path, changes: list[str], out: Path | None) -> str:
    scenario, place = prepare(given, changes, out, folder.settings.devices)
    return Runs(folder).ask(str(given), changes, scenario, place)[1]


def prepare(given: Path, changes: list[str], out: Path | None, boards: int) -> tuple[Scenario, Path]:
    """The scenario of a run and its folder, checked as far as it goes before boards are there. Raises RequestError.

    `boards` is how many the fleet has; 0: not known.
    """
    from lightcl.scenario import load_scenario
    from server.aggregation import Aggregator
    from server.app import images_are_here

    if str(given) == "-":
        raise RequestError("SCENARIO is '-', but a server needs a file or the name of a bundled scenario")
    scenario = load_scenario(given, changes)
    Aggregator.check(scenario)
    if scenario.fleet.devices < boards:
        raise RequestError(
            f"fleet.devices is {scenario.fleet.devices}, but the fleet has {boards} boards (devices in server.toml); "
            f"add --set fleet.devices={boards}"
        )
    if scenario.network.freeze == "auto" and not images_are_here(scenario):
        raise RequestError(
            "network.freeze is 'auto', but this server has no images to choose from; run `lightcl analyze` where "
            "images are, and set network.freeze to the block that it names"
        )
    folder = (out or Path("runs") / f"{scenario.name}-{scenario.seed}").expanduser().absolute()
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise RequestError(f"--out: {folder} cannot be written to ({there} is not a folder, or not yours to write)")
    return scenario, folder
