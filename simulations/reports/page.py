"""The report of a run: one HTML page that needs nothing but itself, and its figures as PNG files.

It reads only the run folder (lightcl/records), so it can be made while a run is in progress and after it was killed.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isnan
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from lightcl.analysis.generalizability import Generalizability
from lightcl.errors import RequestError
from lightcl.metrics import AccuracyMatrix, Spread, fleet_summary
from lightcl.records import DeviceHistory, DeviceRow, RoundRow, Run, load_run
from lightcl.records.folder import ANALYSIS, RunFolder
from lightcl.scenario import Scenario
from lightcl.storage.files import write_atomically
from simulations.options import number_ranges
from simulations.reports import plots

MOST_DEVICES = 200
"""More devices than this are not all listed, only the worst and the best half of this number."""
MOST_REASONS = 50


def build_report(folder: RunFolder) -> Path:
    """Writes `plots/*.png` and `report.html` into the run folder; returns the page.

    A run that is still going on, or was killed, is reported as far as it came. Raises RequestError where the folder
    holds no readable run.
    """
    run = reported(load_run(folder.path))
    pictures = _draw(run)
    target = folder.path / "plots"
    target.mkdir(exist_ok=True)
    for picture in pictures:
        (target / f"{picture.name}.png").write_bytes(picture.light)
    page = folder.path / "report.html"
    write_atomically(page, _render(run, pictures))
    return page


# -- the run -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reason:
    """One reason for failures, and where it occurred: devices and rounds, sorted."""

    text: str
    times: int
    devices: list[int]
    rounds: list[int]


@dataclass(frozen=True)
class FreezeChoice:
    """With `network.freeze: auto`: the analysis, its threshold and the block that was chosen."""

    found: Generalizability
    threshold: float
    point: str


@dataclass(frozen=True)
class ReportedRun:
    """A run with the groups of devices that the page is about."""

    run: Run
    choice: FreezeChoice | None
    """None where the freeze point was given."""

    @property
    def scenario(self) -> Scenario:
        return self.run.scenario

    @property
    def rounds(self) -> list[RoundRow]:
        return self.run.rounds

    @cached_property
    def held(self) -> dict[int, int]:
        """Training images by device number; not of a board with images of its own."""
        return {n: len(row["train"]) for n, row in self.run.partition.items() if isinstance(row.get("train"), list)}

    @cached_property
    def tested(self) -> list[DeviceHistory]:
        return [device for device in self.run.histories if device.tasks_done]

    @cached_property
    def finished(self) -> list[DeviceHistory]:
        return [device for device in self.run.histories if device.finished]

    @property
    def compared(self) -> list[DeviceHistory]:
        """The devices behind the headline: those that finished; while none can have, all that were tested."""
        return self.finished if self.run.results and self.finished else self.tested

    @property
    def dropped_by_reason(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for number, reason in sorted(self.run.dropped.items()):
            found.setdefault(reason, []).append(number)
        return found

    @cached_property
    def reasons(self) -> list[Reason]:
        """Why devices failed; the most frequent reason first."""
        by_reason: dict[str, list[DeviceRow]] = {}
        for row in self.run.devices:
            if row.error is not None:
                by_reason.setdefault(row.error, []).append(row)
        found = [
            Reason(text, len(rows), sorted({row.device for row in rows}), sorted({row.round for row in rows}))
            for text, rows in by_reason.items()
        ]
        return sorted(found, key=lambda reason: -reason.times)

    @property
    def seconds(self) -> float:
        return float(sum(row.seconds for row in self.rounds))

    @property
    def bytes_down(self) -> int:
        return sum(row.bytes_down for row in self.rounds)

    @property
    def bytes_up(self) -> int:
        return sum(row.bytes_up for row in self.rounds)

    @property
    def status(self) -> tuple[str, str]:
        """The run's state in words, and how to take it: "good", "warning" or "bad"."""
        results, failure, dropped = self.run.results, self.run.failure, self.run.dropped
        if results is None:
            if failure and len(dropped) == self.scenario.fleet.devices:
                return "stopped: every device was dropped from the run", "bad"
            if failure:
                return f"stopped: {failure.reason}", "bad"
            return "still running or killed", "warning"
        if dropped:
            return f"completed without {len(dropped):,} of {results.devices:,} devices", "warning"
        return "completed", "good"


def reported(run: Run) -> ReportedRun:
    """Raises RequestError where its analysis of the blocks cannot be read."""
    record, choice = run.analysis, None
    if record is not None:
        try:
            choice = FreezeChoice(Generalizability.from_record(record), record["threshold"], record["freeze"])
        except (KeyError, TypeError, AttributeError) as error:
            raise RequestError(f"{run.path / ANALYSIS}: not the record of an analysis ({error!r})") from error
    return ReportedRun(run, choice)


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


def _draw(run: ReportedRun) -> list[Picture]:
    """The figures that there is something to draw in."""
    settings = run.scenario.settings
    matrices = {s: [device.matrix(s) for device in run.tested] for s in settings}
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
    bars = {s: spread_of_forgetting([device.matrix(s) for device in run.compared]) for s in settings}
    if bars["til"] and not run.scenario.method.joint:
        drawn.append(("forgetting", "Forgetting of each task", plots.forgetting_per_task, (bars,)))
    if run.rounds:
        numbers = [row.round for row in run.rounds]
        training = [row.train_seconds for row in run.rounds]
        rest = [max(0.0, row.seconds - t) for row, t in zip(run.rounds, training, strict=True)]
        alt = f"Time of each of {len(numbers)} rounds, {duration(run.seconds)} together"
        drawn.append(("time", alt, plots.seconds_per_round, (numbers, training, rest)))
        down, up = [row.bytes_down for row in run.rounds], [row.bytes_up for row in run.rounds]
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


def listed_devices(devices: Sequence[DeviceHistory]) -> list[DeviceHistory]:
    """All devices, or of more than MOST_DEVICES the worst and the best half: by tasks done, then by final TIL."""
    if len(devices) <= MOST_DEVICES:
        return list(devices)

    def rank(device: DeviceHistory) -> tuple[int, float]:
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


def _render(run: ReportedRun, pictures: Sequence[Picture]) -> str:
    summary = {s: fleet_summary([device.matrix(s) for device in run.compared]) for s in run.scenario.settings}
    return (
        page_environment()
        .get_template("report.html.j2")
        .render(
            reported=run,
            run=run.run,
            summary=summary,
            pictures={picture.name: picture for picture in pictures},
            listed=listed_devices(run.run.histories),
            most_devices=MOST_DEVICES,
            most_reasons=MOST_REASONS,
            light=plots.LIGHT,
            dark=plots.DARK,
        )
    )
