"""Plots of a large fleet: distributions over its devices, and accuracy by images, tasks and skipped tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import NullFormatter, ScalarFormatter

from simulations.reports.plots.style import Theme, legend_above, legend_line, plot_axes, task_ticks

BINS = 30
IMAGE_BINS = 12
"""Groups of devices, of about the same number each, along an axis of images."""
LOG_RATIO = 10
"""An axis of images is logarithmic where the largest share is this many times the smallest."""


def distribution(values: Mapping[str, np.ndarray], label: str, theme: Theme) -> Figure:
    """Histogram over the devices: `values[setting][device]`, 0..1; NaN values do not count. A line is the median."""
    figure, axes = plot_axes(theme, label, "devices")
    known = {setting: 100 * v[~np.isnan(v)] for setting, v in values.items()}
    everything = np.concatenate(list(known.values()))
    low, high = (everything.min(), everything.max()) if len(everything) else (0.0, 100.0)
    edges = np.linspace(low, high if high > low else low + 1.0, BINS + 1).tolist()
    for setting, v in known.items():
        color = theme.settings[setting]
        axes.hist(v, edges, color=color, alpha=0.35, histtype="stepfilled", linewidth=0)
        axes.hist(v, edges, color=color, histtype="step", linewidth=1.4)
        if len(v):
            axes.axvline(float(np.median(v)), color=color, linewidth=1.3, linestyle=(0, (4, 3)))
    handles: list[Any] = [Patch(color=theme.settings[s], alpha=0.6, label=s.upper()) for s in known]
    legend_above(axes, theme, [*handles, _median_handle(theme)])
    return figure


def accuracy_by_images(images: np.ndarray, accuracy: Mapping[str, np.ndarray], theme: Theme) -> Figure:
    """`accuracy[setting][device]` (0..1) over `images[device]`: median and 10th–90th percentile of groups of devices.

    A group holds about a twelfth of the devices, in order of their number of images, and is placed at its median.
    """
    figure, axes = plot_axes(theme, "training images of the device", "final accuracy (%)")
    logarithmic = images.min() > 0 and images.max() >= LOG_RATIO * images.min()
    for setting, values in accuracy.items():
        color, known = theme.settings[setting], ~np.isnan(values)
        if not known.any():
            continue
        number, reached = images[known], 100 * values[known]
        alpha = float(np.clip(300 / len(number), 0.08, 0.5))
        axes.plot(number, reached, ".", color=color, markersize=2.2, alpha=alpha, markeredgewidth=0)
        order = np.argsort(number, kind="stable")
        groups = [g for g in np.array_split(order, min(IMAGE_BINS, len(order))) if len(g)]
        places = [float(np.median(number[g])) for g in groups]
        low, middle, high = (np.array([np.percentile(reached[g], q) for g in groups]) for q in (10, 50, 90))
        axes.fill_between(places, low, high, color=color, alpha=0.22, linewidth=0)
        axes.plot(places, middle, color=color, linewidth=1.9, marker="o", markersize=4)
    if logarithmic:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(which="minor", length=0)
    axes.set_ylim(0, 102)
    _setting_legend(axes, theme, accuracy)
    return figure


def accuracy_by_tasks_learned(learned: np.ndarray, accuracy: Mapping[str, np.ndarray], theme: Theme) -> Figure:
    """`accuracy[setting][device]` (0..1) by `learned[device]`, the tasks that it learned: median, and whiskers from the
    10th to the 90th percentile. The number of devices is below each tick.
    """
    figure, axes = plot_axes(theme, "tasks learned (below: devices)", "final accuracy (%)")
    counts = np.unique(learned)
    for index, (setting, values) in enumerate(accuracy.items()):
        color, shift = theme.settings[setting], 0.16 * (index - (len(accuracy) - 1) / 2)
        for place, count in enumerate(counts):
            found = 100 * values[(learned == count) & ~np.isnan(values)]
            if len(found):
                low, middle, high = np.percentile(found, [10, 50, 90])
                axes.vlines(place + shift, low, high, color=color, linewidth=4, alpha=0.4)
                axes.plot(place + shift, middle, "o", color=color, markersize=5.5)
    axes.set_xticks(range(len(counts)), [f"{count}\n{int((learned == count).sum()):,}" for count in counts])
    axes.set_xlim(-0.6, len(counts) - 0.4)
    axes.set_ylim(0, 102)
    _setting_legend(axes, theme, accuracy)
    return figure


def skipped_tasks(shares: np.ndarray, theme: Theme) -> Figure:
    """`shares[task]`: the share (0..1) of devices that skip the task, one bar each."""
    figure, axes = plot_axes(theme, "task", "devices that skip it (%)")
    axes.bar(np.arange(len(shares)), 100 * shares, 0.72, color=theme.first, linewidth=0, zorder=2)
    task_ticks(axes, len(shares))
    axes.set_xlim(-0.6, len(shares) - 0.4)
    axes.set_ylim(0, max(1.0, 108 * shares.max()))
    return figure


def _median_handle(theme: Theme) -> Line2D:
    return Line2D([], [], color=theme.muted, linewidth=1.3, linestyle=(0, (4, 3)), label="median")


def _setting_legend(axes: Axes, theme: Theme, settings: Mapping[str, Any]) -> None:
    handles: list[Any] = [legend_line(theme.settings[s], f"{s.upper()} median") for s in settings]
    handles.append(Patch(color=theme.muted, alpha=0.3, linewidth=0, label="10th–90th percentile"))
    legend_above(axes, theme, handles)
