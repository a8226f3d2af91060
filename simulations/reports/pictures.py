"""The figures of a run's report: which ones there are, with their texts, painted for light and dark pages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from simulations.reports import plots
from simulations.reports.figures import (
    ReportedRun,
    chance,
    mean_matrix,
    spread_of_forgetting,
    spread_over_tasks,
)
from simulations.reports.wording import duration, percent, size


@dataclass(frozen=True)
class Picture:
    """One figure as PNG, for a light and for a dark page, and the same two for a narrow screen where it has such."""

    name: str
    alt: str
    light: bytes
    dark: bytes
    narrow: tuple[bytes, bytes] | None = None


@dataclass(frozen=True)
class Drawing:
    """A figure that is not yet drawn: `draw(theme)` returns it, `draw_narrow(theme)` one for a narrow screen."""

    name: str
    alt: str
    draw: Callable[[plots.Theme], Figure]
    draw_narrow: Callable[[plots.Theme], Figure] | None = None


def paint(drawings: Sequence[Drawing]) -> list[Picture]:
    return [Picture(d.name, d.alt, *_both(d.draw), _both(d.draw_narrow) if d.draw_narrow else None) for d in drawings]


def panel_drawing(name: str, alt: str, draw: Callable[..., Figure]) -> Drawing:
    """A figure of several panels, which a narrow screen shows one below the other: `draw(theme=..., narrow=...)`."""
    return Drawing(
        name, alt, lambda theme: draw(theme=theme, narrow=False), lambda theme: draw(theme=theme, narrow=True)
    )


def _both(draw: Callable[[plots.Theme], Figure]) -> tuple[bytes, bytes]:
    light, dark = (plots.png(draw(theme)) for theme in plots.THEMES)
    return light, dark


def drawings_of(run: ReportedRun, *, distributions: bool) -> list[Drawing]:
    """The figures that the run has data for; `distributions` adds those of a large fleet."""
    drawn = _accuracy(run)
    if distributions:
        drawn += _distributions(run)
    drawn += _rounds(run)
    if run.measured:
        drawn += _boards(run)
    if run.choice:
        alt = "Memory stability, learning plasticity and readiness of every block"
        drawn.append(_drawing("generalizability", alt, plots.generalizability, run.choice.found, run.choice.threshold))
    return drawn


def _drawing(name: str, alt: str, draw: Callable[..., Figure], *values: Any) -> Drawing:
    return Drawing(name, alt, partial(draw, *values))


def _accuracy(run: ReportedRun) -> list[Drawing]:
    settings = run.scenario.settings
    matrices = {s: [device.matrix(s) for device in run.tested] for s in settings}
    drawn = []
    if run.tested:
        curves = {s: spread_over_tasks(matrices[s]) for s in settings}
        ends = ", ".join(f"{s.upper()} {percent(curves[s][-1].mean)} %" for s in settings if curves[s])
        alt = f"Average accuracy after each task; after the last one: {ends}"
        drawn.append(_drawing("accuracy", alt, plots.accuracy_over_tasks, curves, chance(run.scenario, run.classes)))
        if run.scenario.stream.tasks > 1:
            for s in settings:
                alt = f"Mean accuracy matrix, {s.upper()}"
                drawn.append(_drawing(f"matrix-{s}", alt, plots.accuracy_matrix, mean_matrix(matrices[s])))
    # The same devices as in the headline, so that the bars average to its figure.
    bars = {s: spread_of_forgetting([device.matrix(s) for device in run.compared]) for s in settings}
    if bars["til"] and not run.scenario.method.joint:
        drawn.append(_drawing("forgetting", "Forgetting of each task", plots.forgetting_per_task, bars))
    return drawn


def _distributions(run: ReportedRun) -> list[Drawing]:
    """Accuracy, forgetting, and accuracy by images and by tasks learned, of the devices in the headline figures."""
    devices, settings = run.compared, run.scenario.settings

    def values(key: str) -> dict[str, np.ndarray]:
        return {s: np.array([d.figures[s][key] if s in d.figures else np.nan for d in devices]) for s in settings}

    drawn = []
    accuracy, forgetting = values("average_accuracy"), values("forgetting")
    if devices:
        alt = f"Distribution of the final accuracy over {len(devices):,} devices"
        drawn.append(_drawing("accuracy-distribution", alt, plots.distribution, accuracy, "final accuracy (%)"))
    if not run.scenario.method.joint and any(not np.isnan(v).all() for v in forgetting.values()):
        alt = f"Distribution of forgetting over {len(devices):,} devices"
        label = "forgetting (percentage points)"
        drawn.append(_drawing("forgetting-distribution", alt, plots.distribution, forgetting, label))
    images = np.array([run.training_images.get(d.number, -1) for d in devices])
    if len(devices) and len(np.unique(images[images >= 0])) > 1:
        known = images >= 0
        by_images = {s: v[known] for s, v in accuracy.items()}
        alt = "Final accuracy by the number of training images of a device"
        drawn.append(_drawing("accuracy-by-images", alt, plots.accuracy_by_images, images[known], by_images))
    learned = np.array([run.learned[d.number] for d in devices])
    if len(np.unique(learned)) > 1:
        alt = "Final accuracy by the number of tasks that a device learned"
        drawn.append(_drawing("accuracy-by-tasks", alt, plots.accuracy_by_tasks_learned, learned, accuracy))
    if run.skipped:
        counts = np.zeros(run.scenario.stream.tasks)
        for tasks in run.skipped.values():
            counts[tasks] += 1
        alt = "Share of devices that skip each task"
        drawn.append(_drawing("skipped", alt, plots.skipped_tasks, counts / max(1, len(run.run.partition))))
    return drawn


def _rounds(run: ReportedRun) -> list[Drawing]:
    if not run.rounds:
        return []
    numbers = [row.round for row in run.rounds]
    training = [row.train_seconds for row in run.rounds]
    rest = [max(0.0, row.seconds - t) for row, t in zip(run.rounds, training, strict=True)]
    alt = f"Time of each of {len(numbers)} rounds, {duration(run.seconds)} together"
    drawn = [_drawing("time", alt, plots.seconds_per_round, numbers, training, rest)]
    down, up = [row.bytes_down for row in run.rounds], [row.bytes_up for row in run.rounds]
    if any(down) or any(up):
        alt = f"Sent in each round; together {size(sum(down))} down and {size(sum(up))} up"
        drawn.append(_drawing("bytes", alt, plots.bytes_per_round, numbers, down, up))
    return drawn


def _boards(run: ReportedRun) -> list[Drawing]:
    """What the boards' sensors said, with the limits that the boards have set themselves."""
    kinds: list[tuple[str, str, str, str | None]] = [
        ("temperature", "highest temperature (°C)", "temperature_c", "limit_temperature_c"),
        ("power", "mean power (W)", "power_watts", None),
        ("energy", "energy (J)", "energy_joules", None),
        ("memory", "peak memory of the process (MiB)", "peak_memory_mib", None),
        ("battery", "battery (%)", "battery_percent", "limit_battery_percent"),
        ("disk", "free disk (MB)", "free_disk_mb", "limit_free_disk_mb"),
    ]
    drawn = []
    for name, label, value, limit in kinds:
        lines = _lines(run, value)
        limits = sorted({v for row in run.run.devices if limit and (v := getattr(row, limit)) is not None})
        if any(lines.values()) and (name != "disk" or limits):
            alt = f"{label[0].upper()}{label[1:]} of {len(lines)} boards in each round"
            drawn.append(_drawing(f"board-{name}", alt, plots.measured_over_rounds, lines, label, limits))
    return drawn


def _lines(run: ReportedRun, key: str) -> dict[str, list[plots.Measured]]:
    """The values of each device that measures anything, by its name and, where two have the same, its number."""
    names = {row.device: row.name or f"device {row.device}" for row in run.measured}
    counts = Counter(names.values())
    names = {number: f"{name} ({number})" if counts[name] > 1 else name for number, name in sorted(names.items())}
    lines: dict[str, list[plots.Measured]] = {name: [] for name in names.values()}
    for row in run.run.devices:
        value = getattr(row, key)
        if value is not None and row.device in names:
            marked = plots.Measured(row.round, value, bool(row.throttled), row.backed_off_seconds is not None)
            lines[names[row.device]].append(marked)
    return lines
