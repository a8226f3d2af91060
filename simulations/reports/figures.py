"""The numbers of a run's report: devices that count, spreads over the fleet, reasons for failures, chance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lightcl.analysis.generalizability import Generalizability
from lightcl.assembly import stream_plan
from lightcl.errors import RequestError
from lightcl.metrics import FEW_TEST_IMAGES, AccuracyMatrix, Spread
from lightcl.records import DeviceHistory, DeviceRow, RoundRow, Run
from lightcl.records.folder import ANALYSIS
from lightcl.scenario import Scenario


def recorded_classes(run: Run) -> int | None:
    """Rows of the head, from run.json; None in the runs of earlier versions and of boards with images of their own."""
    found = run.about.get("classes")
    return found if type(found) is int and found > 0 else None


@dataclass(frozen=True)
class Reason:
    """One reason for failures, and where it occurred: devices and rounds, sorted."""

    text: str
    times: int
    devices: list[int]
    rounds: list[int]


@dataclass(frozen=True)
class FreezeChoice:
    """With `network.freeze: auto`: the analysis, its threshold and the chosen block."""

    found: Generalizability
    threshold: float
    point: str


@dataclass(frozen=True)
class ReportedRun:
    """A run and the groups of devices that the page shows."""

    run: Run
    choice: FreezeChoice | None
    """None where the scenario names the freeze point."""

    @property
    def scenario(self) -> Scenario:
        return self.run.scenario

    @property
    def rounds(self) -> list[RoundRow]:
        return self.run.rounds

    @property
    def classes(self) -> int | None:
        """Rows of the head: the classes of all streams of the fleet. None where the run did not record it."""
        return recorded_classes(self.run)

    @cached_property
    def training_images(self) -> dict[int, int]:
        """Training images by device number; boards with images of their own are left out."""
        return {n: len(row["train"]) for n, row in self.run.partition.items() if isinstance(row.get("train"), list)}

    @cached_property
    def test_images(self) -> dict[int, int]:
        """Test images by device number, summed over the tasks of the device's last test."""
        return {row.device: sum(row.images) for row in self.run.devices if row.images}

    @cached_property
    def few_test_images(self) -> dict[int, int]:
        """`test_images` of the devices that are tested on fewer than FEW_TEST_IMAGES images, fewest first."""
        final = {device.number for device in self.compared}
        few = {n: count for n, count in self.test_images.items() if count < FEW_TEST_IMAGES and n in final}
        return dict(sorted(few.items(), key=lambda item: item[1]))

    @cached_property
    def skipped(self) -> dict[int, list[int]]:
        """The tasks that a device skips because it has too few images, by device number; from partition.json."""
        skipped = {n: [entry["task"] for entry in self.run.skipped_of(n)] for n in self.run.partition}
        return {n: tasks for n, tasks in skipped.items() if tasks}

    @cached_property
    def learned(self) -> dict[int, int]:
        """The number of tasks that each device has learned and was tested on, by device number."""
        return {device.number: len(device.til.learned) for device in self.run.histories}

    @cached_property
    def tested(self) -> list[DeviceHistory]:
        return [device for device in self.run.histories if self.learned[device.number]]

    @cached_property
    def finished(self) -> list[DeviceHistory]:
        """The devices that learned every task of their streams."""
        return [device for device in self.tested if device.finished]

    @cached_property
    def compared(self) -> list[DeviceHistory]:
        """The devices in the headline figures: those that finished or, before the run ends, all tested ones."""
        return self.finished if self.run.results and self.finished else self.tested

    @cached_property
    def ranked(self) -> list[DeviceHistory]:
        """The compared devices from the worst to the best final TIL accuracy."""
        return sorted(self.compared, key=lambda device: device.figures["til"]["average_accuracy"])

    @cached_property
    def summary(self) -> dict[str, dict[str, Spread]]:
        """`[setting][figure]`: the final figures over the compared devices (as lightcl.metrics.fleet_summary)."""
        rows = {s: [d.figures[s] for d in self.compared if s in d.figures] for s in self.scenario.settings}
        return {
            s: {key: Spread.of([row[key] for row in found]) for key in AccuracyMatrix(1).summary()}
            for s, found in rows.items()
        }

    @cached_property
    def measured(self) -> list[DeviceRow]:
        """The rows with something from a board's sensors."""
        keys = ("temperature_c", "power_watts", "energy_joules", "battery_percent")
        return [row for row in self.run.devices if any(getattr(row, key) is not None for key in keys)]

    @cached_property
    def backed_off(self) -> list[DeviceRow]:
        """The rows of devices that the server waited for because they were outside their own limits."""
        return [row for row in self.run.devices if row.backed_off_seconds is not None]

    @cached_property
    def joules(self) -> float | None:
        """The energy of all trainings of the devices that measured each of theirs."""
        known = [device.joules for device in self.run.histories if device.joules is not None]
        return sum(known) if known else None

    @cached_property
    def joules_per_task(self) -> float | None:
        """The same for each task that these devices have learned."""
        known = [device for device in self.run.histories if device.joules is not None]
        tasks = sum(device.tasks_done for device in known)
        return sum(device.joules or 0.0 for device in known) / tasks if tasks else None

    @property
    def power_sources(self) -> list[str]:
        return sorted({row.power_source for row in self.measured if row.power_source})

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
    def device_rounds(self) -> int:
        """How many times a device took part in a round."""
        return sum(row.devices for row in self.rounds)

    @property
    def status(self) -> tuple[str, str]:
        """The run's state in words, and its severity: "good", "warning" or "bad"."""
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
    """Raises RequestError where the run's analysis of the blocks cannot be read."""
    record, choice = run.analysis, None
    if record is not None:
        try:
            choice = FreezeChoice(Generalizability.from_record(record), record["threshold"], record["freeze"])
        except (KeyError, TypeError, AttributeError) as error:
            raise RequestError(f"{run.path / ANALYSIS}: not the record of an analysis ({error!r})") from error
    return ReportedRun(run, choice)


def spread_over_tasks(matrices: Sequence[AccuracyMatrix]) -> list[Spread]:
    """`[t]`: average accuracy after task t over the devices that were tested then; NaN where none was."""
    if not matrices:
        return []
    stack = np.stack([m.values for m in matrices])  # [devices, t, k]
    tested = ~np.isnan(stack)
    counts = tested.sum(axis=2)  # [devices, t]
    means = np.where(counts > 0, np.nansum(stack, axis=2) / np.maximum(counts, 1), np.nan)
    last = np.flatnonzero((counts > 0).any(axis=0))
    return [Spread.of(list(means[:, after])) for after in range(int(last[-1]) + 1 if len(last) else 0)]


def spread_of_forgetting(matrices: Sequence[AccuracyMatrix]) -> list[Spread]:
    """`[k]`: forgetting of task k over the devices that have learned it and a later one."""
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


def chance(scenario: Scenario, classes: int | None = None) -> dict[str, float]:
    """`[setting]`: accuracy of guessing among the classes of a task (TIL) or of all streams of the fleet (CIL).

    CIL counts the classes of later tasks too: a test uses the entire head from the first task on. `classes` are the
    rows of the head, as the run recorded them; None: not recorded, and CIL is left out where the scenario alone does
    not say (devices with classes or a class order of their own).
    """
    plan = stream_plan(scenario)
    if classes is None and not plan.own_classes and not plan.stream.per_device_order:
        classes = plan.stream.classes_per_task * plan.stream.tasks
    return {"til": 1 / plan.stream.classes_per_task} | ({} if classes is None else {"cil": 1 / classes})
