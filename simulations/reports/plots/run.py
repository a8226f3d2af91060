"""The figures of a run's report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from lightcl.metrics import Spread
from simulations.reports.plots.style import (
    FONT,
    SIZE,
    Theme,
    legend_above,
    legend_line,
    plot_axes,
    readable,
    task_ticks,
)

ANNOTATED_TASKS = 15
"""With more tasks than this, the cells of a heat map are too small for numbers."""
SEPARATE_BARS = 60
"""More rounds than this are drawn without gaps between the bars."""


# -- accuracy ------------------------------------------------------------------------------------------------------


def accuracy_over_tasks(curves: Mapping[str, Sequence[Spread]], chance: Mapping[str, float], theme: Theme) -> Figure:
    """`curves[setting][t]`: spread over the devices of the average accuracy (0..1) on tasks 0..t after task t.

    Settings are "til" and "cil". Where a single task was tested the band becomes a whisker. `chance[setting]` is what
    guessing gives.
    """
    figure, axes = plot_axes(theme, "after task", "average accuracy (%)")
    many = any(spread.p10 < spread.p90 for spreads in curves.values() for spread in spreads)
    for setting, spreads in curves.items():
        color = theme.settings[setting]
        tasks = np.arange(len(spreads))
        mean, low, high = (100 * np.array([getattr(s, key) for s in spreads]) for key in ("mean", "p10", "p90"))
        if len(spreads) > 1:
            axes.fill_between(tasks, low, high, color=color, alpha=0.22, linewidth=0)
        elif many:
            axes.vlines(tasks, low, high, color=color, alpha=0.4, linewidth=5)
        marker = "o" if len(spreads) <= 30 else None
        axes.plot(tasks, mean, color=color, linewidth=1.9, marker=marker, markersize=4.5)
        if setting in chance:
            axes.axhline(100 * chance[setting], color=color, linewidth=1.1, linestyle=(0, (4, 3)), alpha=0.8)
    axes.set_ylim(0, 102)
    task_ticks(axes, max((len(spreads) for spreads in curves.values()), default=0))
    handles: list[Any] = [legend_line(theme.settings[setting], setting.upper()) for setting in curves]
    if many:
        handles.append(Patch(color=theme.muted, alpha=0.3, linewidth=0, label="10th–90th percentile"))
    if chance:
        handles.append(Line2D([], [], color=theme.muted, linewidth=1.1, linestyle=(0, (4, 3)), label="chance"))
    legend_above(axes, theme, handles)
    return figure


def accuracy_matrix(values: np.ndarray, theme: Theme) -> Figure:
    """Heat map of `values[t, k]`, accuracy (0..1) on task k after task t; NaN, where there was no test, stays empty.

    The colors always span 0..100 %, so that TIL and CIL, and two reports, can be compared by eye.
    """
    tasks = len(values)
    figure, axes = plot_axes(theme, "accuracy on task", "after task", size=(SIZE[0], 4.1), grid=False)
    figure.set_layout_engine("compressed")  # keeps the color bar beside the square heat map
    colors = LinearSegmentedColormap.from_list("accuracy", [theme.pale, theme.deep])
    image = axes.imshow(100 * values, cmap=colors, vmin=0, vmax=100, aspect="equal")
    bar = figure.colorbar(image, ax=axes, pad=0.04, aspect=28, ticks=[0, 25, 50, 75, 100])
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=theme.muted, labelsize=FONT - 1, length=0)
    bar.set_label("accuracy (%)", color=theme.muted, fontsize=FONT)
    for side in axes.spines.values():
        side.set_visible(False)
    task_ticks(axes, tasks)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
    if tasks <= ANNOTATED_TASKS:
        # Thin lines of the background's color make cells of what would be a surface.
        axes.set_xticks(np.arange(tasks + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(tasks + 1) - 0.5, minor=True)
        axes.grid(which="minor", color=theme.background, linewidth=1.5)
        axes.tick_params(which="minor", length=0)
        text_size = FONT if tasks <= 6 else FONT - 1 if tasks <= 10 else FONT - 2.5
        for (after, on), value in np.ndenumerate(100 * values):
            if not np.isnan(value):
                text = f"{value:.1f}" if tasks <= 6 else f"{value:.0f}"
                color = readable(colors(value / 100), theme)
                axes.text(on, after, text, ha="center", va="center", fontsize=text_size, color=color)
    return figure


def forgetting_per_task(bars: Mapping[str, Sequence[Spread]], theme: Theme) -> Figure:
    """`bars[setting][k]`: spread over the devices of the forgetting (0..1) of task k; whiskers are one std."""
    figure, axes = plot_axes(theme, "task", "forgetting (percentage points)")
    width = 0.8 / max(1, len(bars))
    for index, (setting, spreads) in enumerate(bars.items()):
        places = np.arange(len(spreads)) + (index - (len(bars) - 1) / 2) * width
        mean, std = (100 * np.array([getattr(s, key) for s in spreads]) for key in ("mean", "std"))
        axes.bar(places, mean, width * 0.92, color=theme.settings[setting], zorder=2)
        if std.any():
            axes.errorbar(
                places, mean, std, fmt="none", ecolor=theme.ink, alpha=0.75, zorder=3, elinewidth=1.1, capthick=1.1,
                capsize=2.5 if len(spreads) <= 20 else 0.0,
            )  # fmt: skip
    axes.spines["bottom"].set_visible(False)  # the line at zero takes its place
    axes.axhline(0, color=theme.muted, linewidth=0.9, zorder=4)
    tasks = max((len(spreads) for spreads in bars.values()), default=0)
    task_ticks(axes, tasks)
    axes.set_xlim(-0.6, tasks - 0.4)
    legend_above(axes, theme, [Patch(color=theme.settings[setting], label=setting.upper()) for setting in bars])
    return figure


# -- rounds --------------------------------------------------------------------------------------------------------


def bytes_per_round(rounds: Sequence[int], down: Sequence[float], up: Sequence[float], theme: Theme) -> Figure:
    """Bytes of all devices together, stacked: from the server (`down`) and to it (`up`)."""
    top = max((d + u for d, u in zip(down, up, strict=True)), default=0.0)
    factor, unit = next(((f, u) for f, u in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if top >= f), (1.0, "bytes"))
    return _stacked(rounds, {"down, to the devices": down, "up, to the server": up}, factor, f"sent ({unit})", theme)


def seconds_per_round(
    rounds: Sequence[int], training: Sequence[float], evaluation: Sequence[float], theme: Theme
) -> Figure:
    """Wall-clock seconds of each round, stacked: training and what came after it."""
    top = max((t + e for t, e in zip(training, evaluation, strict=True)), default=0.0)
    factor, unit = next(((f, u) for f, u in ((3600.0, "h"), (60.0, "min")) if top >= 3 * f), (1.0, "s"))
    return _stacked(rounds, {"training": training, "evaluation": evaluation}, factor, f"time ({unit})", theme)


def _stacked(
    rounds: Sequence[int], parts: Mapping[str, Sequence[float]], factor: float, label: str, theme: Theme
) -> Figure:
    figure, axes = plot_axes(theme, "round", label)
    width = min(0.72, 0.24 * len(rounds)) if len(rounds) <= SEPARATE_BARS else 1.0
    base = np.zeros(len(rounds))
    handles = []
    for (name, values), color in zip(parts.items(), (theme.first, theme.second), strict=True):
        heights = np.asarray(values, dtype=float) / factor
        axes.bar(rounds, heights, width, bottom=base, color=color, linewidth=0, zorder=2)
        base = base + heights
        handles.append(Patch(color=color, label=name))
    axes.set_xlim(min(rounds) - 0.7, max(rounds) + 0.7)
    axes.set_ylim(0, 1.05 * max(base.max(), np.finfo(float).tiny))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12, min_n_ticks=1))
    legend_above(axes, theme, handles)
    return figure
