"""The table of devices: its columns, the rows on the page, and all rows as devices.csv."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isnan

from lightcl.records import DeviceHistory
from simulations.reports.figures import ReportedRun
from simulations.reports.wording import DASH, minus

Value = float | str | None
FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""How a text begins that spreadsheets take for a formula."""


@dataclass(frozen=True)
class Column:
    """One figure of a device. `name` is the heading in devices.csv, where accuracies stay in 0..1."""

    name: str
    heading: str
    value: Callable[[DeviceHistory], Value]
    decimals: int | None = 0
    """On the page; None for text."""
    scale: float = 1.0
    """On the page; 100 for an accuracy."""
    grouped: bool = True
    """On the page: a comma between thousands; False for device numbers."""

    def known(self, device: DeviceHistory) -> Value:
        """The value, or None where there is none."""
        value = self.value(device)
        return None if isinstance(value, float) and isnan(value) else value

    def rounded(self, device: DeviceHistory) -> Value:
        """As the page shows it, for sorting and searching."""
        value = self.known(device)
        if value is None or isinstance(value, str):
            return value
        scaled = round(self.scale * value, self.decimals) + 0.0
        return scaled if self.decimals else int(scaled)

    def text(self, device: DeviceHistory) -> str:
        value = self.rounded(device)
        if value is None:
            return DASH
        if isinstance(value, str):
            return value
        return minus(f"{value:{',' if self.grouped else ''}.{self.decimals}f}")


def columns_of(run: ReportedRun) -> list[Column]:
    """The columns that the run has data for."""

    def figure(setting: str, key: str) -> Callable[[DeviceHistory], Value]:
        return lambda device: device.figures[setting][key] if setting in device.figures else None

    devices, settings = run.run.histories, run.scenario.settings
    columns = [Column("device", "Device", lambda d: d.number, grouped=False)]
    if any(device.name for device in devices):
        columns.append(Column("name", "Name", lambda d: d.name, None))
    columns.append(Column("tasks_learned", "Tasks learned", lambda d: run.learned[d.number]))
    if run.skipped:
        columns.append(Column("tasks_skipped", "Tasks skipped", lambda d: len(run.skipped.get(d.number, ()))))
    for key, words in (("average_accuracy", "{} (%)"), ("forgetting", "Forgetting {} (pp)")):
        for s in settings:
            if key != "forgetting" or not run.scenario.method.joint:
                columns.append(Column(f"{s}_{key}", words.format(s.upper()), figure(s, key), 1, 100.0))
    columns.append(Column("training_samples", "Training samples", lambda d: d.samples))
    if run.training_images:
        columns.append(Column("training_images", "Images", lambda d: run.training_images.get(d.number)))
    columns += [
        Column("test_images", "Test images", lambda d: run.test_images.get(d.number)),
        Column("seconds", "Time (s)", lambda d: d.seconds, 1),
        Column("failures", "Failures", lambda d: d.failures),
    ]
    if run.joules is not None:
        columns.append(Column("joules_per_task", "Energy per task (J)", lambda d: d.joules_per_task, 1))
    if run.run.dropped:
        columns.append(Column("dropped", "Dropped", lambda d: "dropped" if d.number in run.run.dropped else "", None))
    return columns


def devices_csv(columns: Sequence[Column], devices: Sequence[DeviceHistory]) -> str:
    """All devices, figures not rounded; a field without a value is empty.

    A text that a spreadsheet would compute begins with ' instead: boards choose their names.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([column.name for column in columns])
    writer.writerows([_cell(column.known(device)) for column in columns] for device in devices)
    return out.getvalue()


def _cell(value: Value) -> Value:
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value


def named_devices(run: ReportedRun) -> list[tuple[str, DeviceHistory]]:
    """The worst, the median and the best device by final TIL accuracy."""
    ranked = run.ranked
    if not ranked:
        return []
    return [("Worst", ranked[0]), ("Median", ranked[(len(ranked) - 1) // 2]), ("Best", ranked[-1])]
