"""Reading a run folder: typed rows, accuracy matrices, pandas frames. For reports and notebooks.

    from lightcl.records import load_run

    run = load_run("runs/quickstart")
    run.results.til.average_accuracy.mean
    run.matrices("cil")[0].values            # [t, k]: device 0's accuracy on task k after task t
    run.devices_frame()                      # needs pandas

A run can be read while it is in progress or after it was killed; all finished rounds are present.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightcl.errors import RequestError
from lightcl.metrics import AccuracyMatrix, row_over
from lightcl.records.folder import ROUNDS, RunFolder
from lightcl.records.old_runs import translated
from lightcl.records.rows import DeviceRow, Failure, Results, RoundRow
from lightcl.scenario import Scenario, scenario_from_json

if TYPE_CHECKING:
    import pandas

SETTINGS = ("til", "cil")


@dataclass(frozen=True)
class DeviceHistory:
    """One device over the whole run.

    `tasks` are the scenario's numbers of the tasks that it learns; the matrices have holes for the others. `samples`
    counts its training images of the tasks it has begun, `seconds` its own time in training and evaluation, `failures`
    the rounds in which it failed.
    """

    number: int
    name: str
    til: AccuracyMatrix
    cil: AccuracyMatrix
    samples: int
    seconds: float
    failures: int
    tasks: tuple[int, ...]
    joules: float | None = None
    """The energy of all its trainings; None where it did not measure each of them."""

    @property
    def joules_per_task(self) -> float | None:
        """Energy per task that it has learned, those trainings included that had to be repeated."""
        return self.joules / self.tasks_done if self.joules is not None and self.tasks_done else None

    @property
    def tasks_done(self) -> int:
        """How many tasks it has learned and was tested on."""
        return len(self.til.learned)

    @property
    def finished(self) -> bool:
        """Whether it has learned all of its tasks and was tested on them."""
        return self.tasks_done == len(self.tasks)

    def matrix(self, setting: str) -> AccuracyMatrix:
        """`til` or `cil` by name."""
        return self.til if setting == "til" else self.cil

    @cached_property
    def figures(self) -> dict[str, dict[str, float]]:
        """`["til" | "cil"][figure]`: the figures of AccuracyMatrix.summary, for the settings it was tested in."""
        return {s: self.matrix(s).summary() for s in SETTINGS if self.matrix(s).last >= 0}

    @classmethod
    def of(cls, rows: Sequence[DeviceRow], tasks: int, learns: Sequence[int] | None = None) -> DeviceHistory:
        """From one device's rows, by round. Of the scenario's `tasks` it learns those in `learns`; None: all."""
        # Each row names its tested tasks: the device's first ones, but for those whose test images are gone.
        ids = sorted({task for row in rows for task in row.tested})
        til: dict[int, list[float]] = {}
        cil: dict[int, list[float]] = {}
        for row in rows:
            for accuracies, tested in ((til, row.til), (cil, row.cil)):
                if row.examples is not None:
                    # The device trains this task now. Earlier results on this task or later ones are void: its state
                    # was lost.
                    for task in [t for t in accuracies if t >= row.task]:
                        del accuracies[task]
                if tested:
                    accuracies[row.task] = row_over(ids, row.tested, tested)
        samples = {row.task: row.examples for row in rows if row.examples is not None}
        energies = [row.energy_joules for row in rows if row.examples is not None]
        measured = [energy for energy in energies if energy is not None]
        return cls(
            number=rows[-1].device,
            name=rows[-1].name,
            til=AccuracyMatrix.from_rows(til, tasks, ids),
            cil=AccuracyMatrix.from_rows(cil, tasks, ids),
            samples=sum(samples.values()),
            seconds=float(sum((row.train_seconds or 0.0) + (row.evaluate_seconds or 0.0) for row in rows)),
            failures=sum(row.error is not None for row in rows),
            tasks=tuple(range(tasks) if learns is None else learns),
            joules=sum(measured) if measured and len(measured) == len(energies) else None,
        )


@dataclass(frozen=True)
class Run:
    """The content of a run folder."""

    path: Path
    scenario: Scenario
    about: dict[str, Any]
    """run.json without the scenario: command, versions, machine."""
    rounds: list[RoundRow]
    devices: list[DeviceRow]
    """One row per device and round, in the order of devices.jsonl."""
    results: Results | None
    """None before the run is completed."""
    failure: Failure | None
    """Why the server stopped the run; None if it did not, or if the run was resumed since."""
    partition: dict[int, dict[str, Any]]
    """Rows of partition.json by device: `train` and `test` (indices, or a text for images that are not listed) and, if
    it skips tasks, `tasks` (those that it learns) and `skipped`; empty if unknown."""
    analysis: dict[str, Any] | None
    """generalizability.json: the figures behind a freeze point chosen by `network.freeze: auto`; None otherwise."""
    last_written: datetime
    """When the run last wrote a round."""

    @cached_property
    def histories(self) -> list[DeviceHistory]:
        """Each device over the whole run, by number; only devices that have a row."""
        by_device = self._by_device()
        tasks = self.scenario.stream.tasks
        return [DeviceHistory.of(by_device[number], tasks, self.tasks_of(number)) for number in sorted(by_device)]

    def tasks_of(self, device: int) -> tuple[int, ...]:
        """The numbers of the tasks that a device learns, ascending; all if partition.json does not say."""
        tasks = self.partition.get(device, {}).get("tasks")
        return tuple(range(self.scenario.stream.tasks) if tasks is None else tasks)

    def skipped_of(self, device: int) -> list[dict[str, Any]]:
        """The tasks that a device skips, each as `task`, `reason`, `train` and `test` (its numbers of images).

        Entries of partition.json that name no task of the scenario are left out.
        """
        listed = self.partition.get(device, {}).get("skipped")
        tasks = range(self.scenario.stream.tasks)
        return [
            entry
            for entry in (listed if isinstance(listed, list) else ())
            if isinstance(entry, dict) and type(entry.get("task")) is int and entry["task"] in tasks
        ]

    def matrices(self, setting: str = "til") -> dict[int, AccuracyMatrix]:
        """The accuracy matrix of every device that was tested, by device number; `setting` is "til" or "cil"."""
        if setting not in SETTINGS:
            raise RequestError(f"setting is {setting!r}; allowed: {', '.join(SETTINGS)}")
        found = {history.number: history.matrix(setting) for history in self.histories}
        return {number: matrix for number, matrix in found.items() if matrix.last >= 0}

    @cached_property
    def dropped(self) -> dict[int, str]:
        """The devices that were dropped from the run, by number, and why.

        Before the end of the run they are derived from the failures, as a server that was never restarted counts them.
        """
        end = self.results or self.failure
        if end is not None:
            return end.dropped
        section = self.scenario.server
        found = {}
        for number, rows in sorted(self._by_device().items()):
            failed = [row.error is not None for row in rows]
            in_a_row = len(rows) >= section.max_failures and all(failed[-section.max_failures :])
            if in_a_row or (failed[-1] and sum(failed) >= section.max_failures_in_run):
                found[number] = rows[-1].error or ""
        return found

    def devices_frame(self) -> pandas.DataFrame:
        """One row per device and round; the columns are the fields of DeviceRow.

        Adds `til_mean` and `cil_mean`, the average accuracies after the round. Raises RequestError without pandas.
        """
        rows = [asdict(row) | {"til_mean": _mean(row.til), "cil_mean": _mean(row.cil)} for row in self.devices]
        names = [*DeviceRow.__dataclass_fields__, "til_mean", "cil_mean"]
        return _pandas().DataFrame(rows, columns=names)

    def rounds_frame(self) -> pandas.DataFrame:
        """One row per round; the columns are the fields of RoundRow, `til` and `cil` as `til_mean`, `til_std`, ...

        Raises RequestError without pandas.
        """
        names: list[str] = []
        for name in RoundRow.__dataclass_fields__:
            names += [f"{name}_{part}" for part in _SPREAD] if name in SETTINGS else [name]
        rows = []
        for row in self.rounds:
            values = asdict(row)
            for setting in SETTINGS:
                spread = values.pop(setting) or {}
                values |= {f"{setting}_{part}": spread.get(part) for part in _SPREAD}
            rows.append(values)
        return _pandas().DataFrame(rows, columns=names)

    def _by_device(self) -> dict[int, list[DeviceRow]]:
        found: dict[int, list[DeviceRow]] = {}
        for row in self.devices:
            found.setdefault(row.device, []).append(row)
        return found


_SPREAD = ("mean", "std", "p10", "p90")


def load_run(path: str | Path) -> Run:
    """Reads a run folder, including runs in progress and runs of versions whose scenario had a `runtime` section.

    Raises RequestError where the folder holds no run or a file in it is broken; the text names file, line and field.
    """
    folder = RunFolder(Path(path))
    about = folder.read()
    return Run(
        path=folder.path,
        scenario=recorded_scenario(folder, about.pop("scenario")),
        about=about,
        rounds=folder.rounds(),
        devices=folder.devices(),
        results=folder.results(),
        failure=folder.failure(),
        partition=folder.partition(),
        analysis=folder.analysis(),
        last_written=_last_written(folder.path / name for name in ("run.json", ROUNDS)),
    )


def recorded_scenario(folder: RunFolder, values: dict[str, Any]) -> Scenario:
    """The scenario of a run.json, old keys translated. Raises RequestError naming the file."""
    try:
        return scenario_from_json(json.dumps(translated(values)), "the scenario in it is not valid")
    except RequestError as error:
        advice = (
            "; if a plugin registers it, give the plugin's file with --plugin FILE (report, compare, export) or in "
            "LIGHTCL_PLUGINS"
        )
        raise RequestError(f"{folder.path / 'run.json'}: {error}{advice if 'unknown' in str(error) else ''}") from error


def _last_written(files: Iterable[Path]) -> datetime:
    return datetime.fromtimestamp(max(file.stat().st_mtime if file.exists() else 0.0 for file in files), UTC)


def _mean(accuracies: Sequence[float] | None) -> float | None:
    return sum(accuracies) / len(accuracies) if accuracies else None


def _pandas() -> Any:
    try:
        import pandas
    except ImportError as error:
        raise RequestError("a table of rows needs pandas: pip install pandas") from error
    return pandas
