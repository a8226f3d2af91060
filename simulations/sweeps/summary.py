"""The summary of a sweep: one table as Markdown, JSON and CSV, a picture, and a page that compares the points.

Figures of a cell are means over its devices. The table shows means over the seeds; devices that were trained alone are
averaged first, seed by seed.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isnan
from statistics import fmean
from typing import Any

import numpy as np
from rich.console import Console

from lightcl.analysis.footprint.shapes import MIB
from lightcl.storage.files import write_atomically
from simulations.options import amount
from simulations.reports.comparison import Group, build_comparison, difference
from simulations.reports.run_figures import read_figures, read_results
from simulations.reports.statistics import Difference, Mean
from simulations.sweeps.description import Spread
from simulations.sweeps.grid import Cell, Point, Sweep
from simulations.sweeps.processes import dropped_devices

TABLE, RECORDS, CELLS, PICTURE, PAGE = "summary.md", "summary.json", "summary.csv", "summary.png", "comparison.html"
OUTPUTS = (TABLE, RECORDS, CELLS, PICTURE, PAGE, "plots")
FIGURES = (("cil", "average_accuracy"), ("til", "average_accuracy"), ("cil", "forgetting"), ("til", "forgetting"))
BASELINE_METHOD = "sgd"
SPREADS: Mapping[Spread, str] = {
    "standard-error": "standard error",
    "standard-deviation": "standard deviation",
    "interval": "half of the 95 % interval (Student's t)",
}


@dataclass(frozen=True)
class Row:
    """One point: accuracies in 0..1 over the seeds, memory in bytes."""

    label: str
    seeds: int
    """Seeds whose runs are complete."""
    figures: Mapping[str, Mean | None]
    """By "cil average_accuracy" and so on; None where the method is not tested for it or no run is complete."""
    flops: float | None = None
    counted: int | None = None
    """Peak of a training step by our count, bytes."""
    measured: int | None = None
    """The same as measured in a fresh process, bytes."""
    seconds: float | None = None
    bytes_down: float | None = None
    """Of the entire run, mean over the seeds."""
    bytes_up: float | None = None
    joules: float | None = None
    """Energy per learned task, mean over the devices and seeds that measured it; None where none did."""

    def to_json(self) -> dict[str, Any]:
        values: dict[str, Any] = {
            "name": self.label,
            "seeds": self.seeds,
            "flops": self.flops,
            "memory_theory_bytes": self.counted,
            "memory_measured_bytes": self.measured,
            "seconds": self.seconds,
            "bytes_down": self.bytes_down,
            "bytes_up": self.bytes_up,
            "joules_per_task": self.joules,
        }
        for name, figure in self.figures.items():
            values[name] = figure and {
                "mean": figure.mean,
                "std": None if isnan(figure.deviation) else figure.deviation,
                "standard_error": None if isnan(figure.error) else figure.error,
            }
        return values


def results_of(sweep: Sweep, cell: Cell) -> Any | None:
    """The cell's final figures; None where its run is not complete."""
    return read_results(sweep.run_folder(cell))


def row_of(sweep: Sweep, point: Point, footprint: Mapping[str, Any] | None, group: Group | None = None) -> Row:
    """One point, over the seeds whose runs are all complete; `group` are its complete runs, for their energy."""
    by_seed: list[list[Any]] = []
    for seed in sweep.seeds:
        results = [results_of(sweep, cell) for cell in sweep.of(point) if cell.seed == seed]
        if all(result is not None for result in results):
            by_seed.append(results)
    joint = sweep.of(point)[0].scenario.method.joint
    figures: dict[str, Mean | None] = {}
    for setting, key in FIGURES:
        tested = [[r[setting][key]["mean"] for r in results if r[setting]] for results in by_seed]
        values = [fmean(found) for found in tested if found]
        figures[f"{setting} {key}"] = None if joint and key == "forgetting" else Mean.of(values)

    def mean(values: list[float]) -> float | None:
        return fmean(values) if values else None

    return Row(
        point.label,
        len(by_seed),
        figures,
        footprint["theory"]["training_flops"] if footprint else None,
        (footprint.get("theory_second_task") or footprint["theory"])["peak"] if footprint else None,
        footprint["measured"]["training"] if footprint else None,
        mean([fmean(r["seconds"] for r in results) for results in by_seed]),
        mean([sum(r["bytes_down"] for r in results) for results in by_seed]),
        mean([sum(r["bytes_up"] for r in results) for results in by_seed]),
        spent.mean if group and (spent := group.joules) else None,
    )


# -- Markdown ------------------------------------------------------------------------------------------------------


def table(
    sweep: Sweep, record: Mapping[str, Any], rows: Sequence[Row],
    differences: Mapping[str, Mapping[str, Difference | None]],
) -> str:  # fmt: skip
    """Markdown: what was run, one row per point, and the differences from the baseline."""
    starts, scenario = record["starts"], sweep.scenario
    spread = sweep.description.spread
    scope = (
        f"device {', '.join(map(str, sweep.devices))} of {scenario.fleet.devices}" if sweep.devices else "all devices"
    )
    commits = ", ".join(dict.fromkeys((start["git_commit"] or "unknown")[:12] for start in starts))
    keys = [key for key in sweep.description.grid if key.startswith("training.")]
    recipe = [
        f"{amount(scenario.training.epochs, 'epoch')} per task" if "training.epochs" not in keys else "",
        f"batch {scenario.training.batch_size}" if "training.batch_size" not in keys else "",
    ]
    facts = [
        scenario.data.source,
        f"{amount(scenario.stream.tasks, 'task')} x {amount(scenario.stream.classes_per_task, 'class', 'classes')}",
        *recipe, scenario.device.precision, scope, f"seeds {', '.join(map(str, sweep.seeds))}",
    ]  # fmt: skip
    lines = [
        f"# Sweep of {scenario.name}",
        "",
        *dict.fromkeys(f"    {start['command']}" for start in starts),
        "",
        f"{', '.join(filter(None, facts))}; commit {commits}, "
        f"torch {starts[-1]['libraries']['torch']}, {starts[-1]['machine']}.",
        "",
        *(f"Changed from the scenario: {line}." for line in sweep.resets),
        *([""] if sweep.resets else []),
        *(f"Left out: {line}." for line in sweep.skipped),
        *([""] if sweep.skipped else []),
        f"Accuracy and forgetting in percent, mean ± {SPREADS[spread]} over the seeds.",
    ]
    if sweep.description.footprint:
        lines[-1] += (
            " FLOPs: counted for the training steps of an entire stream (for a fleet, device 0's; without work between "
            "tasks). Memory: peak of a training step of the second task in MiB (2^20 bytes), counted (theory) and "
            "measured (tensors)."
        )
    lines += ["", *_main_table(sweep, rows, spread)]
    lines += _difference_table(sweep, differences)
    lost = [
        f"{cell.title}: {dropped_devices(found)}; `--resume` tries again"
        for cell in sweep.cells
        if (found := results_of(sweep, cell)) and found["dropped"]
    ]
    lines += [line for text in lost for line in ("", text)]
    return "\n".join(lines) + "\n"


def _main_table(sweep: Sweep, rows: Sequence[Row], spread: Spread) -> list[str]:
    headings = ["method" if sweep.description.methods else "run", "seeds", "CIL", "TIL", "CIL forgetting"]
    headings += ["TIL forgetting"]
    if sweep.description.footprint:
        headings += ["TFLOPs", "MiB, theory", "MiB, measured", "measured / theory", "measured / SGD"]
    sent = any(row.bytes_down or row.bytes_up for row in rows)
    headings += ["MB down", "MB up"] if sent else []
    measured_energy = any(row.joules is not None for row in rows)
    headings += ["J per learned task"] if measured_energy else []
    headings += ["seconds per run"]
    measured = {row.label: row.measured for row in rows}
    setting = {point.label: point.setting for point in sweep.points}
    # SGD's memory under the same values of the grid.
    sgd = {p.setting: measured.get(p.label) for p in sweep.points if _method(sweep, p) == BASELINE_METHOD}
    lines = [f"| {' | '.join(headings)} |", "|" + "---|" * len(headings)]
    for row in rows:
        cells = [row.label.replace("|", "\\|"), str(row.seeds)]
        cells += [_percent(row.figures[f"{s} {key}"], spread) for s, key in FIGURES]
        if sweep.description.footprint:
            cells += [_significant(row.flops, 1e12), _number(row.counted, MIB, 1), _number(row.measured, MIB, 1)]
            cells += [_ratio(row.measured, row.counted), _ratio(row.measured, sgd.get(setting[row.label]))]
        cells += [_number(row.bytes_down, 1e6, 1), _number(row.bytes_up, 1e6, 1)] if sent else []
        cells += [_significant(row.joules, 1)] if measured_energy else []
        lines.append(f"| {' | '.join([*cells, _number(row.seconds, 1, 0)])} |")
    return lines


def _method(sweep: Sweep, point: Point) -> str:
    return sweep.of(point)[0].scenario.method.name


def _difference_table(sweep: Sweep, differences: Mapping[str, Mapping[str, Difference | None]]) -> list[str]:
    """What each point gains over its baseline, in percentage points with a 95 % interval."""
    if not any(found for by_figure in differences.values() for found in by_figure.values()):
        return []
    lines = [
        "",
        "Difference from the baseline in percentage points, with its 95 % interval (Student's t) over pairs of the "
        "same device and seed:",
        "",
        "| run | baseline | pairs | CIL | TIL | CIL forgetting | TIL forgetting |",
        "|---|---|---|---|---|---|---|",
    ]
    for point in sweep.points:
        found = differences.get(point.label)
        if not found:
            continue
        count = next((d.count for d in found.values() if d), 0)
        cells = [point.label, sweep.baseline_of(point).label, str(count)]
        cells += [_points(found[f"{s} {key}"]) for s, key in FIGURES]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _points(found: Difference | None) -> str:
    if found is None:
        return "–"
    interval = "" if isnan(found.low) else f" [{100 * found.low:+.2f}, {100 * found.high:+.2f}]"
    return f"{100 * found.mean:+.2f}{interval}{'' if found.paired else ' (unpaired)'}"


def _percent(figure: Mean | None, spread: Spread) -> str:
    if figure is None:
        return "–"
    widths = {"standard-error": figure.error, "standard-deviation": figure.deviation, "interval": figure.margin}
    width = widths[spread]
    return f"{100 * figure.mean:.2f}" + (f" ± {100 * width:.2f}" if not isnan(width) else "")


def _ratio(first: float | None, second: float | None) -> str:
    return f"{first / second:.2f}" if first and second else "–"


def _number(value: float | None, unit: float, decimals: int) -> str:
    return "–" if value is None else f"{value / unit:.{decimals}f}"


def _significant(value: float | None, unit: float) -> str:
    """To three significant digits, without an exponent: small values do not read as 0.0."""
    return (
        "–"
        if value is None
        else np.format_float_positional(value / unit, precision=3, fractional=False, trim="-", unique=False)
    )


# -- files ---------------------------------------------------------------------------------------------------------


def cells_csv(sweep: Sweep) -> str:
    """One line per complete cell; accuracies in 0..1."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    keys = list(sweep.description.grid)
    figures = [f"{s} {key}" for s, key in FIGURES]
    writer.writerow(
        [
            "variant",
            *keys,
            "seed",
            "device",
            "devices_finished",
            "dropped",
            *figures,
            "bytes_down",
            "bytes_up",
            "seconds",
        ]
    )
    for cell in sweep.cells:
        results = results_of(sweep, cell)
        if results is None:
            continue
        values = [results[s][key]["mean"] if results[s] else "" for s, key in FIGURES]
        writer.writerow([
            cell.point.variant, *(_value_of(cell, key) for key in keys), cell.seed,
            "" if cell.device is None else cell.device, results["devices_finished"], len(results["dropped"]), *values,
            results["bytes_down"], results["bytes_up"], results["seconds"],
        ])  # fmt: skip
    return buffer.getvalue()


def _value_of(cell: Cell, key: str) -> Any:
    value: Any = cell.scenario.model_dump(mode="json")
    for part in key.split("."):
        value = value[part]
    return value


def groups_of(sweep: Sweep, footprints: Mapping[str, Any]) -> list[Group]:
    """The points with complete runs, for a comparison."""
    groups = []
    for point in sweep.points:
        cells = [cell for cell in sweep.of(point) if results_of(sweep, cell)]
        if cells:
            runs = tuple(read_figures(sweep.run_folder(cell)) for cell in cells)
            size = footprints.get(point.label)
            groups.append(Group(point.label, runs, size["measured"]["training"] if size else None))
    return groups


def write_summary(
    sweep: Sweep, record: Mapping[str, Any], footprints: Mapping[str, Any], console: Console
) -> None:  # fmt: skip
    """Writes and prints the summary of all complete runs."""
    from simulations.reports.plots import LIGHT, accuracy_over_memory, png

    groups = {group.label: group for group in groups_of(sweep, footprints)}
    rows = [row_of(sweep, p, footprints.get(p.label), groups.get(p.label)) for p in sweep.points]
    differences = {}
    for point in sweep.points:
        base = sweep.baseline_of(point)
        if point != base and point.label in groups and base.label in groups:
            found = {f"{s} {key}": difference(groups[point.label], groups[base.label], s, key) for s, key in FIGURES}
            differences[point.label] = found
    text = table(sweep, record, rows, differences)
    write_atomically(sweep.folder / TABLE, text)
    write_atomically(sweep.folder / CELLS, cells_csv(sweep))
    entries = [row.to_json() | _difference_json(sweep, row.label, differences) for row in rows]
    write_atomically(sweep.folder / RECORDS, json.dumps(entries, indent=2))
    console.print(text, highlight=False, markup=False, soft_wrap=True)
    points = {
        s: {
            row.label: (row.measured / MIB, figure.mean, figure.deviation)
            for row in rows
            if row.measured and (figure := row.figures[f"{s} average_accuracy"])
        }
        for s in ("cil", "til")
    }
    if any(points.values()):
        (sweep.folder / PICTURE).write_bytes(png(accuracy_over_memory(points, LIGHT)))
    if len(groups) > 1:
        build_comparison(list(groups.values()), sweep.folder, title=sweep.scenario.name, baselines={
            point.label: sweep.baseline_of(point).label for point in sweep.points
        }, command=record["starts"][-1]["command"])  # fmt: skip
    for name in (TABLE, CELLS, PICTURE, PAGE):
        if (sweep.folder / name).exists():
            console.print(os.path.relpath(sweep.folder / name), highlight=False, markup=False, soft_wrap=True)


def _difference_json(
    sweep: Sweep, label: str, differences: Mapping[str, Mapping[str, Difference | None]]
) -> dict[str, Any]:
    found = differences.get(label)
    if not found:
        return {"baseline": None, "differences": None}
    point = next(point for point in sweep.points if point.label == label)
    return {
        "baseline": sweep.baseline_of(point).label,
        "differences": {
            name: d and {
                "mean": d.mean, "low": None if isnan(d.low) else d.low, "high": None if isnan(d.high) else d.high,
                "count": d.count, "paired": d.paired,
            }
            for name, d in found.items()
        },
    }  # fmt: skip
