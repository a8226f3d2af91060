"""The report of a run: one HTML page that needs nothing but itself, and its figures as PNG files.

It reads only the run folder (server/records.py), so it can be made while a run is going on and after one was killed.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from math import isnan
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from lightcl.analysis.generalizability import Generalizability
from lightcl.errors import RequestError
from lightcl.metrics import AccuracyMatrix, Spread, fleet_summary
from lightcl.records.folder import ANALYSIS, RunFolder
from lightcl.records.rows import Row
from lightcl.scenario import Scenario, scenario_from_json
from lightcl.storage.files import write_atomically
from simulations.options import number_ranges
from simulations.reports import plots

SETTINGS = ("til", "cil")
MOST_DEVICES = 200
"""More devices than this are not all listed, only the worst and the best half of this number."""
MOST_REASONS = 50


def build_report(folder: RunFolder) -> Path:
    """Writes `plots/*.png` and `report.html` into the run folder; returns the page.

    A run that is still going on, or was killed, is reported as far as it came. Raises RequestError where the folder
    holds no readable run.
    """
    run = read_run(folder)
    pictures = _draw(run)
    target = folder.path / "plots"
    target.mkdir(exist_ok=True)
    for picture in pictures:
        (target / f"{picture.name}.png").write_bytes(picture.light)
    page = folder.path / "report.html"
    write_atomically(page, _render(run, pictures))
    return page


# -- what the run folder says --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DeviceRecord:
    """One device over the whole run. `samples` are its training samples of the tasks it has begun, `seconds` its own
    time in training and evaluation, `failures` the rounds in which it failed."""

    number: int
    name: str
    til: AccuracyMatrix
    cil: AccuracyMatrix
    samples: int
    seconds: float
    failures: int

    @property
    def tasks_done(self) -> int:
        return self.til.last + 1

    @cached_property
    def figures(self) -> dict[str, dict[str, float]]:
        """`["til" | "cil"][figure]`, figures as in AccuracyMatrix.summary, of the settings it was tested in."""
        return {s: getattr(self, s).summary() for s in SETTINGS if getattr(self, s).last >= 0}


@dataclass(frozen=True)
class Failure:
    """One reason, and whom it met: devices and rounds, sorted."""

    reason: str
    times: int
    devices: list[int]
    rounds: list[int]


@dataclass(frozen=True)
class FreezeChoice:
    """What `network.freeze: auto` was decided from, and how."""

    found: Generalizability
    threshold: float
    point: str


@dataclass(frozen=True)
class RunRecord:
    """What a run folder holds. `about` is run.json without the scenario; `results` is None before the run's end."""

    scenario: Scenario
    about: Row
    results: Row | None
    rounds: list[Row]
    devices: list[DeviceRecord]
    failures: list[Failure]
    failure: Row | None
    """Why the server gave the run up, where it did and the run has not gone on since."""
    dropped: dict[int, str]
    """The devices that were put out of the run, by number, and why."""
    held: dict[int, int]
    """Training images by device number, of partition.json; none for a board with images of its own."""
    choice: FreezeChoice | None
    """None where the freeze point was given."""
    last_sign: datetime

    @property
    def tested(self) -> list[DeviceRecord]:
        return [device for device in self.devices if device.tasks_done]

    @property
    def finished(self) -> list[DeviceRecord]:
        return [device for device in self.devices if device.tasks_done == self.scenario.stream.tasks]

    @property
    def dropped_by_reason(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for number, reason in sorted(self.dropped.items()):
            found.setdefault(reason, []).append(number)
        return found

    @property
    def compared(self) -> list[DeviceRecord]:
        """The devices behind the headline: those that finished; while none can have, all that were tested."""
        return self.finished if self.results and self.finished else self.tested

    @property
    def seconds(self) -> float:
        return float(sum(row["timing"]["seconds"] for row in self.rounds))

    def total(self, key: str) -> int:
        """Bytes of all rounds; `key` is "bytes_down" or "bytes_up"."""
        return int(sum(row[key] for row in self.rounds))

    @property
    def status(self) -> tuple[str, str]:
        """The run's state in words, and how to take it: "good", "warning" or "bad"."""
        if self.results is None:
            if self.failure and len(self.dropped) == self.scenario.fleet.devices:
                return "stopped: every device is out of the run", "bad"
            if self.failure:
                return f"stopped: {self.failure['reason']}", "bad"
            return "still running or killed", "warning"
        if self.dropped:
            return f"completed without {len(self.dropped):,} of {self.results['devices']:,} devices", "warning"
        return "completed", "good"


def read_run(folder: RunFolder) -> RunRecord:
    """Raises RequestError where the folder holds no run or its scenario is not one."""
    about = folder.read()
    try:
        scenario = scenario_from_json(json.dumps(about.pop("scenario", {})))
    except RequestError as error:
        raise RequestError(f"{folder.path / 'run.json'}: the scenario in it is not valid: {error}") from error
    rows, results, failure = folder.rows("devices.jsonl"), folder.results(), folder.failure()
    by_device: dict[int, list[Row]] = {number: [] for number in sorted({row["device"] for row in rows})}
    for row in rows:
        by_device[row["device"]].append(row)
    newest = max((folder.path / name for name in ("run.json", "rounds.jsonl")), key=_written)
    return RunRecord(
        scenario=scenario,
        about=about,
        results=results,
        rounds=folder.rows("rounds.jsonl"),
        devices=[_read_device(mine, scenario.stream.tasks) for mine in by_device.values()],
        failures=_read_failures(rows),
        failure=failure,
        dropped=_read_dropped(by_device, results or failure, scenario.server.max_failures),
        held={n: len(row["train"]) for n, row in folder.partition().items() if isinstance(row.get("train"), list)},
        choice=_read_choice(folder),
        last_sign=datetime.fromtimestamp(_written(newest), UTC),
    )


def _read_choice(folder: RunFolder) -> FreezeChoice | None:
    record = folder.analysis()
    if record is None:
        return None
    try:
        return FreezeChoice(Generalizability.from_record(record), record["threshold"], record["freeze"])
    except (KeyError, TypeError, AttributeError) as error:
        raise RequestError(f"{folder.path / ANALYSIS}: not the record of an analysis ({error!r})") from error


def _written(file: Path) -> float:
    return file.stat().st_mtime if file.exists() else 0.0


def _read_device(rows: Sequence[Row], tasks: int) -> DeviceRecord:
    """One device's rows, by round."""
    accuracies: dict[str, dict[int, list[float]]] = {s: {} for s in SETTINGS}
    for row in rows:
        for setting, mine in accuracies.items():
            if "examples" in row:
                # It is learning this task now, so what it knew of this and later ones is void: its state was lost.
                for task in [t for t in mine if t >= row["task"]]:
                    del mine[task]
            if setting in row:
                mine[row["task"]] = row[setting]
    samples = {row["task"]: row["examples"] for row in rows if "examples" in row}
    times = [row["timing"].get(key, 0.0) for row in rows for key in ("train_seconds", "evaluate_seconds")]
    return DeviceRecord(
        number=rows[-1]["device"],
        name=str(rows[-1]["name"]),
        til=AccuracyMatrix.from_rows(accuracies["til"], tasks),
        cil=AccuracyMatrix.from_rows(accuracies["cil"], tasks),
        samples=sum(samples.values()),
        seconds=float(sum(times)),
        failures=sum("error" in row for row in rows),
    )


def _read_dropped(by_device: Mapping[int, Sequence[Row]], results: Row | None, max_failures: int) -> dict[int, str]:
    """From the results, or before there are any from the failures in a row, as the server counts them."""
    if results is not None:
        return {int(number): str(reason) for number, reason in results["dropped"].items()}
    last = {number: rows[-max_failures:] for number, rows in by_device.items()}
    return {
        number: str(rows[-1]["error"])
        for number, rows in last.items()
        if len(rows) == max_failures and all("error" in row for row in rows)
    }


def _read_failures(rows: Sequence[Row]) -> list[Failure]:
    """The most frequent reason first."""
    by_reason: dict[str, list[Row]] = {}
    for row in rows:
        if "error" in row:
            by_reason.setdefault(str(row["error"]), []).append(row)
    found = [
        Failure(reason, len(mine), sorted({r["device"] for r in mine}), sorted({r["round"] for r in mine}))
        for reason, mine in by_reason.items()
    ]
    return sorted(found, key=lambda failure: -failure.times)


# -- figures -------------------------------------------------------------------------------------------------------


def spread_over_tasks(matrices: Sequence[AccuracyMatrix]) -> list[Spread]:
    """`[t]`: average accuracy after task t over those devices that were tested then."""
    return [
        Spread.of([m.average_accuracy(after) for m in matrices if not np.isnan(m.values[after]).all()])
        for after in range(max((m.last for m in matrices), default=-1) + 1)
    ]


def spread_of_forgetting(matrices: Sequence[AccuracyMatrix]) -> list[Spread]:
    """`[k]`: forgetting of task k over those devices that have learned a later one."""
    rows = [m.forgetting_per_task() for m in matrices]
    return [
        Spread.of([float(row[task]) for row in rows if len(row) > task])
        for task in range(max((len(row) for row in rows), default=0))
    ]


def mean_matrix(matrices: Sequence[AccuracyMatrix]) -> np.ndarray:
    """`[t, k]`: mean over the devices that were tested there, NaN where none was."""
    stack = np.stack([m.values for m in matrices])
    counts = (~np.isnan(stack)).sum(axis=0)
    means: np.ndarray = np.where(counts > 0, np.nansum(stack, axis=0) / np.maximum(counts, 1), np.nan)
    return means


def chance(scenario: Scenario) -> dict[str, float]:
    """`[setting]`: accuracy of guessing among a task's classes (TIL) or among the whole stream's (CIL).

    Among those of later tasks, too: a test asks the whole head from the first task on.
    """
    classes = scenario.stream.classes_per_task
    return {"til": 1 / classes, "cil": 1 / (classes * scenario.stream.tasks)}


@dataclass(frozen=True)
class Picture:
    """One figure as PNG, for a light and for a dark page."""

    name: str
    alt: str
    light: bytes
    dark: bytes


def _draw(run: RunRecord) -> list[Picture]:
    """The figures that there is something to draw in."""
    settings = run.scenario.settings
    matrices = {s: [getattr(device, s) for device in run.tested] for s in settings}
    several = run.scenario.stream.tasks > 1
    drawn: list[tuple[str, str, Any, tuple[Any, ...]]] = []
    if run.tested:
        curves = {s: spread_over_tasks(matrices[s]) for s in settings}
        ends = ", ".join(f"{s.upper()} {percent(curves[s][-1].mean)} %" for s in settings)
        alt = f"Average accuracy after each task; after the last one: {ends}"
        drawn.append(("accuracy", alt, plots.accuracy_over_tasks, (curves, chance(run.scenario))))
    if run.tested and several:
        for s in settings:
            alt = f"Mean accuracy matrix, {s.upper()}"
            drawn.append((f"matrix-{s}", alt, plots.accuracy_matrix, (mean_matrix(matrices[s]),)))
    # The same devices as in the headline, so that the bars average to its figure.
    bars = {s: spread_of_forgetting([getattr(device, s) for device in run.compared]) for s in settings}
    if bars["til"] and not run.scenario.method.joint:
        drawn.append(("forgetting", "Forgetting of each task", plots.forgetting_per_task, (bars,)))
    if run.rounds:
        numbers = [row["round"] for row in run.rounds]
        training = [row["timing"]["train_seconds"] for row in run.rounds]
        rest = [max(0.0, row["timing"]["seconds"] - t) for row, t in zip(run.rounds, training, strict=True)]
        alt = f"Time of each of {len(numbers)} rounds, {duration(run.seconds)} together"
        drawn.append(("time", alt, plots.seconds_per_round, (numbers, training, rest)))
        down, up = ([row[key] for row in run.rounds] for key in ("bytes_down", "bytes_up"))
        if any(down) or any(up):
            alt = f"Sent in each round; together {size(sum(down))} down and {size(sum(up))} up"
            drawn.append(("bytes", alt, plots.bytes_per_round, (numbers, down, up)))
    if run.choice:
        alt = "Memory stability, learning plasticity and readiness of every block"
        drawn.append(("generalizability", alt, plots.generalizability, (run.choice.found, run.choice.threshold)))
    return [
        Picture(name, alt, *(plots.png(draw(*values, theme)) for theme in (plots.LIGHT, plots.DARK)))
        for name, alt, draw, values in drawn
    ]


# -- the page ------------------------------------------------------------------------------------------------------


def percent(value: float) -> str:
    """An accuracy in 0..1 as %, without the sign."""
    return "–" if isnan(value) else f"{100 * value:.1f}"


def points(value: float) -> str:
    """A difference of accuracies in percentage points, without the unit."""
    # Adding 0.0 turns a rounded -0.0 into 0.0.
    return "–" if isnan(value) else f"{round(100 * value, 1) + 0.0:.1f}".replace("-", "−")


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f}\u00a0s"
    if seconds < 7200:
        return f"{seconds // 60:.0f}\u00a0min\u00a0{seconds % 60:02.0f}\u00a0s"
    return f"{seconds // 3600:.0f}\u00a0h\u00a0{seconds % 3600 // 60:02.0f}\u00a0min"


def size(count: float) -> str:
    """Bytes in decimal units."""
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= factor:
            return f"{count / factor:.1f}\u00a0{unit}"
    return f"{count:.0f}\u00a0bytes"


def listed_devices(devices: Sequence[DeviceRecord]) -> list[DeviceRecord]:
    """All devices, or of more than MOST_DEVICES the worst and the best half: by tasks done, then by final TIL."""
    if len(devices) <= MOST_DEVICES:
        return list(devices)

    def rank(device: DeviceRecord) -> tuple[int, float]:
        # An average over fewer tasks is easily higher, so a device that is behind counts as worse.
        return device.tasks_done, device.figures["til"]["average_accuracy"] if device.figures else 0.0

    ranked = sorted(devices, key=rank)
    return ranked[: MOST_DEVICES // 2] + ranked[-MOST_DEVICES // 2 :]


def page_environment() -> jinja2.Environment:
    """Jinja over `templates/`, with the filters that all pages share."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        # Device names and reasons come from other machines.
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "duration": duration,
        "size": size,
        "ranges": number_ranges,
        "base64": lambda data: base64.b64encode(data).decode("ascii"),
    }
    environment.globals |= {"percent": percent, "points": points}
    return environment


def _render(run: RunRecord, pictures: Sequence[Picture]) -> str:
    summary = {s: fleet_summary([getattr(device, s) for device in run.compared]) for s in run.scenario.settings}
    return (
        page_environment()
        .get_template("report.html.j2")
        .render(
            run=run,
            summary=summary,
            pictures={picture.name: picture for picture in pictures},
            listed=listed_devices(run.devices),
            most_devices=MOST_DEVICES,
            most_reasons=MOST_REASONS,
            light=plots.LIGHT,
            dark=plots.DARK,
        )
    )
