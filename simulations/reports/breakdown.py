"""A comparison broken down by what sets the devices apart: how many images they train on, how many tasks they learn.

Devices are put into classes with round limits, the same for all groups. In every class a group has its mean and its
difference from the baseline, each with a 95 % interval, over pairs of the same device and seed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from simulations.reports import plots
from simulations.reports.comparison import (
    Comparison,
    Group,
    Table,
    difference_json,
    mean_interval,
    mean_json,
    pairing_problems,
)
from simulations.reports.pictures import Drawing, panel_drawing
from simulations.reports.run_figures import RunFigures
from simulations.reports.statistics import Difference, Mean, paired_difference
from simulations.reports.wording import DASH, interval_text

By = Literal["images", "tasks"]
NAMES: Mapping[By, str] = {"images": "training images of the device", "tasks": "tasks that the device learns"}
LIMITS = (0, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 100_000)
"""Lower limits of the classes of images."""


@dataclass(frozen=True)
class Class:
    """Devices with `low` to `high` images or tasks, both included; `high` None: no upper limit."""

    low: int
    high: int | None

    @property
    def name(self) -> str:
        if self.high is None:
            return f"{self.low:,}+"
        return f"{self.low:,}" if self.low == self.high else f"{self.low:,}–{self.high:,}"

    def holds(self, value: int) -> bool:
        return self.low <= value and (self.high is None or value <= self.high)


@dataclass(frozen=True)
class Breakdown:
    """`levels` and `gains` by figure ("til average_accuracy" and so on), then by label, then by class; in 0..1."""

    by: By
    classes: list[Class]
    levels: Mapping[str, Mapping[str, list[Mean | None]]]
    gains: Mapping[str, Mapping[str, list[Difference | None]]]
    """Of the groups that can be paired with their baseline."""


def break_down(comparison: Comparison, by: By) -> Breakdown:
    """Every group's means and gains in each class of devices that occurs."""
    values = {group.label: _values(group, by) for group in comparison.groups}
    classes = _classes(by, [value for found in values.values() for value in found.values()])
    by_label = {group.label: group for group in comparison.groups}
    levels: dict[str, dict[str, list[Mean | None]]] = {}
    gains: dict[str, dict[str, list[Difference | None]]] = {}
    for setting, key in comparison.figures:
        figure = f"{setting} {key}"
        levels[figure], gains[figure] = {}, {}
        for label, group in by_label.items():
            observed, places = group.observations(setting, key), values[label]
            by_class = [{at: v for at, v in observed.items() if c.holds(places[at])} for c in classes]
            levels[figure][label] = [Mean.of(list(found.values())) for found in by_class]
            base = by_label[comparison.baselines[label]]
            if base is not group and not pairing_problems(group, base):
                other = base.observations(setting, key)
                gains[figure][label] = [paired_difference(found, other) for found in by_class]
    return Breakdown(by, classes, levels, gains)


def _values(group: Group, by: By) -> dict[tuple[int, int], int]:
    """By (seed, device)."""
    of: Callable[[RunFigures], Mapping[int, int]] = (lambda r: r.samples) if by == "images" else (lambda r: r.learned)
    return {(run.scenario.seed, device): value for run in group.runs for device, value in of(run).items()}


def _classes(by: By, values: Sequence[int]) -> list[Class]:
    """The classes in which there is a device, ascending."""
    if by == "tasks":
        return [Class(value, value) for value in sorted(set(values))]
    highs = [limit - 1 for limit in LIMITS[1:]]
    classes = [Class(low, high) for low, high in zip(LIMITS, [*highs, None], strict=True)]
    return [c for c in classes if any(c.holds(value) for value in values)]


def breakdown_tables(comparison: Comparison, found: Breakdown) -> list[Table]:
    """For every figure the means and the gains, a row per group and a column per class."""
    names = [c.name for c in found.classes]
    tables = []
    for setting, key in comparison.figures:
        figure = f"{setting} {key}"
        words = f"{setting.upper()} {key.replace('_', ' ')} by {NAMES[found.by]}"
        rows = [[label, *map(_level_text, means)] for label, means in found.levels[figure].items() if any(means)]
        tables.append((f"{words}: percent, mean with its 95 % interval, (devices)", ["run", *names], rows))
        if found.gains[figure]:
            rows = [
                [label, comparison.baselines[label], *map(_gain_text, gained)]
                for label, gained in found.gains[figure].items()
                if any(gained)
            ]
            title = f"{words}: difference from the baseline in points, with its 95 % interval, (pairs)"
            tables.append((title, ["run", "minus", *names], rows))
    return tables


def breakdown_drawings(comparison: Comparison, found: Breakdown) -> list[Drawing]:
    """A picture per setting: gain in average accuracy over the classes, a panel per baseline."""
    drawn = []
    for setting in comparison.settings:
        panels: dict[str, dict[str, list[Difference | None]]] = {}
        for label, gained in found.gains[f"{setting} average_accuracy"].items():
            panels.setdefault(comparison.baselines[label], {})[comparison.short_label(label)] = gained
        if panels:
            names = [c.name for c in found.classes]
            y = f"{setting.upper()} gain (points)"
            draw = partial(plots.gains_by_class, panels, names, NAMES[found.by], y)
            alt = f"Gain in {setting.upper()} accuracy over the baseline, by {NAMES[found.by]}"
            drawn.append(panel_drawing(f"compare-{setting}-by-{found.by}", alt, draw))
    return drawn


def breakdown_json(found: Breakdown) -> dict[str, Any]:
    """Classes, and for every figure and group the means and differences in them."""
    return {
        "classes": [c.name for c in found.classes],
        "figures": {
            f: {g: [mean_json(m) for m in ms] for g, ms in groups.items()} for f, groups in found.levels.items()
        },
        "differences": {
            f: {g: [difference_json(d) for d in ds] for g, ds in groups.items()} for f, groups in found.gains.items()
        },
    }


def _level_text(mean: Mean | None) -> str:
    return f"{mean_interval(mean)} ({mean.count:,})" if mean else DASH


def _gain_text(gained: Difference | None) -> str:
    return f"{interval_text(gained)} ({gained.count:,})" if gained else DASH
