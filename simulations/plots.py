"""The figures of a run report.

Every function takes numbers and a theme and returns a matplotlib `Figure` of its own; pyplot and its global state stay
out. Accuracies come in 0..1 and are drawn in %, bytes and seconds come plain and are drawn in the unit that suits them.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from lightcl.generalizability import Generalizability
from lightcl.metrics import Spread

SIZE = (5.4, 3.3)
"""Inches, at 96 CSS pixels an inch about its place on the page; text stays readable at the width of a phone."""
PIXELS_PER_INCH = 192
"""Twice the CSS pixels, for dense screens."""
FONT = 9.0
ANNOTATED_TASKS = 15
"""A heat map of more tasks than this has cells too small for figures."""
SEPARATE_BARS = 60
"""More rounds than this are drawn without gaps, which would only flicker."""


@dataclass(frozen=True)
class Theme:
    """Colours as hex. TIL and CIL are blue and vermilion of Okabe & Ito, told apart with every colour vision.

    `first` and `second` are the parts of a stacked bar; they differ in lightness and are not TIL's and CIL's colours,
    so that no colour means two things.
    """

    background: str
    ink: str
    muted: str
    grid: str
    settings: Mapping[str, str]
    first: str
    second: str
    deep: str
    """The heat map's colour at 100 %; at 0 % it is close to the background."""
    pale: str


LIGHT = Theme(
    background="#ffffff", ink="#1c2430", muted="#5b6675", grid="#e6e9ee", settings={"til": "#0072b2", "cil": "#d55e00"},
    first="#4a5a70", second="#a9b6c6", deep="#08467a", pale="#f1f5f9",
)  # fmt: skip
DARK = Theme(
    background="#1a2029", ink="#e6eaf0", muted="#9aa5b3", grid="#2d3541", settings={"til": "#56b4e9", "cil": "#f08a3c"},
    first="#93a4ba", second="#4d5b6e", deep="#8fd0f7", pale="#232b36",
)  # fmt: skip


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=PIXELS_PER_INCH, facecolor=figure.get_facecolor())
    return buffer.getvalue()


# -- accuracy ------------------------------------------------------------------------------------------------------


def accuracy_over_tasks(
    curves: Mapping[str, Sequence[Spread]], chance: Mapping[str, Sequence[float]], theme: Theme
) -> Figure:
    """`curves[setting][t]`: spread over the devices of the average accuracy (0..1) on tasks 0..t after task t.

    Settings are "til" and "cil". Where a single task was tested the band becomes a whisker. `chance[setting][t]` is
    what guessing gives.
    """
    figure, axes = _axes(theme, "after task", "average accuracy (%)")
    many = any(spread.p10 != spread.p90 for spreads in curves.values() for spread in spreads)
    for setting, spreads in curves.items():
        colour = theme.settings[setting]
        tasks = np.arange(len(spreads))
        mean, low, high = (100 * np.array([getattr(s, key) for s in spreads]) for key in ("mean", "p10", "p90"))
        if len(spreads) > 1:
            axes.fill_between(tasks, low, high, color=colour, alpha=0.22, linewidth=0)
        elif many:
            axes.vlines(tasks, low, high, color=colour, alpha=0.4, linewidth=5)
        marker = "o" if len(spreads) <= 30 else None
        axes.plot(tasks, mean, color=colour, linewidth=1.9, marker=marker, markersize=4.5)
        levels = 100 * np.asarray(chance[setting][: len(spreads)]) if setting in chance else np.empty(0)
        if len(levels) == 1:
            axes.axhline(levels[0], color=colour, linewidth=1.1, linestyle=(0, (4, 3)), alpha=0.8)
        elif len(levels):
            axes.plot(tasks, levels, color=colour, linewidth=1.1, linestyle=(0, (4, 3)), alpha=0.8)
    axes.set_ylim(0, 102)
    _task_ticks(axes, max((len(spreads) for spreads in curves.values()), default=0))
    handles: list[Any] = [_line(theme.settings[setting], setting.upper()) for setting in curves]
    if many:
        handles.append(Patch(color=theme.muted, alpha=0.3, linewidth=0, label="10th–90th percentile"))
    if chance:
        handles.append(Line2D([], [], color=theme.muted, linewidth=1.1, linestyle=(0, (4, 3)), label="chance"))
    _legend(axes, theme, handles)
    return figure


def accuracy_matrix(values: np.ndarray, theme: Theme) -> Figure:
    """Heat map of `values[t, k]`, accuracy (0..1) on task k after task t; NaN, where there was no test, stays empty.

    The colours always span 0..100 %, so that TIL and CIL, and two reports, can be compared by eye.
    """
    tasks = len(values)
    figure, axes = _axes(theme, "accuracy on task", "after task", size=(SIZE[0], 4.1), grid=False)
    figure.set_layout_engine("compressed")  # keeps the colour bar beside the square heat map
    colours = LinearSegmentedColormap.from_list("accuracy", [theme.pale, theme.deep])
    image = axes.imshow(100 * values, cmap=colours, vmin=0, vmax=100, aspect="equal")
    bar = figure.colorbar(image, ax=axes, pad=0.04, aspect=28, ticks=[0, 25, 50, 75, 100])
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=theme.muted, labelsize=FONT - 1, length=0)
    bar.set_label("accuracy (%)", color=theme.muted, fontsize=FONT)
    for side in axes.spines.values():
        side.set_visible(False)
    _task_ticks(axes, tasks)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
    if tasks <= ANNOTATED_TASKS:
        # Thin lines of the background's colour make cells of what would be a surface.
        axes.set_xticks(np.arange(tasks + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(tasks + 1) - 0.5, minor=True)
        axes.grid(which="minor", color=theme.background, linewidth=1.5)
        axes.tick_params(which="minor", length=0)
        text_size = FONT if tasks <= 6 else FONT - 1 if tasks <= 10 else FONT - 2.5
        for (after, on), value in np.ndenumerate(100 * values):
            if not np.isnan(value):
                text = f"{value:.1f}" if tasks <= 6 else f"{value:.0f}"
                colour = _readable(colours(value / 100), theme)
                axes.text(on, after, text, ha="center", va="center", fontsize=text_size, color=colour)
    return figure


def forgetting_per_task(bars: Mapping[str, Sequence[Spread]], theme: Theme) -> Figure:
    """`bars[setting][k]`: spread over the devices of the forgetting (0..1) of task k; whiskers are one std."""
    figure, axes = _axes(theme, "task", "forgetting (percentage points)")
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
    _task_ticks(axes, tasks)
    axes.set_xlim(-0.6, tasks - 0.4)
    _legend(axes, theme, [Patch(color=theme.settings[setting], label=setting.upper()) for setting in bars])
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
    figure, axes = _axes(theme, "round", label)
    width = min(0.72, 0.24 * len(rounds)) if len(rounds) <= SEPARATE_BARS else 1.0
    base = np.zeros(len(rounds))
    handles = []
    for (name, values), colour in zip(parts.items(), (theme.first, theme.second), strict=True):
        heights = np.asarray(values, dtype=float) / factor
        axes.bar(rounds, heights, width, bottom=base, color=colour, linewidth=0, zorder=2)
        base = base + heights
        handles.append(Patch(color=colour, label=name))
    axes.set_xlim(min(rounds) - 0.7, max(rounds) + 0.7)
    axes.set_ylim(0, 1.05 * max(base.max(), np.finfo(float).tiny))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12, min_n_ticks=1))
    _legend(axes, theme, handles)
    return figure


# -- blocks --------------------------------------------------------------------------------------------------------


def generalizability(found: Generalizability, threshold: float, theme: Theme) -> Figure:
    """Memory stability, learning plasticity and readiness of every block: a line a task, and the mean over them.

    Tinted blocks are those that `threshold` freezes; readiness has no part in that, so no threshold is drawn with it.
    """
    figure = Figure(figsize=(9.8, 3.5), dpi=PIXELS_PER_INCH, layout="constrained", facecolor=theme.background)
    names, point = list(found.blocks), found.freeze_point(threshold)
    frozen = names.index(point) + 1 if point != "none" else 0
    kinds = {
        "memory stability": [block.stability for block in found.blocks.values()],
        "learning plasticity": [block.plasticity for block in found.blocks.values()],
        "readiness (as pre-trained)": [block.readiness for block in found.blocks.values()],
    }
    lowest = min(value for values in kinds.values() for block in values for value in block)
    shades = LinearSegmentedColormap.from_list("tasks", [theme.second, theme.deep])
    tasks = len(kinds["memory stability"][0])
    colours = [shades(task / max(1, tasks - 1)) for task in range(tasks)]
    few = tasks <= 5
    for place, (kind, values) in enumerate(kinds.items()):
        axes = figure.add_subplot(1, 3, 1 + place, facecolor=theme.background)
        _style(axes, theme, "", "linear CKA" if place == 0 else "")
        axes.set_title(kind, color=theme.ink, fontsize=FONT + 1, loc="left", pad=8)
        if frozen:
            axes.axvspan(-0.5, frozen - 0.5, color=theme.pale, zorder=0, linewidth=0)
        if place < 2:
            axes.axhline(threshold, color=theme.muted, linewidth=1.1, linestyle=(0, (4, 3)))
        for task, line in enumerate(np.array(values).T):
            axes.plot(line, color=colours[task], linewidth=1.1)
        axes.plot(np.mean(values, 1), color=theme.ink, linewidth=2.2, marker="o", markersize=4.5)
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_xlim(-0.5, len(names) - 0.5)
        axes.set_ylim(max(0.0, min(lowest, threshold) - 0.05), 1.01)
    shown = range(tasks) if few else (0, tasks - 1)
    handles = [Line2D([], [], color=colours[t], linewidth=1.4, label=f"task {t + 1}") for t in shown]
    handles += [_line(theme.ink, "mean")]
    handles += [
        Line2D([], [], color=theme.muted, linewidth=1.1, linestyle=(0, (4, 3)), label=f"threshold {threshold:g}")
    ]
    patches = [Patch(color=theme.pale, label=f"frozen: up to {point}")] if frozen else []
    figure.legend(
        handles=[*handles, *patches], loc="outside lower left", ncols=len(handles) + len(patches), frameon=False,
        fontsize=FONT, labelcolor=theme.ink, handlelength=1.5, handletextpad=0.5, columnspacing=1.2,
    )  # fmt: skip
    return figure


# -- style ---------------------------------------------------------------------------------------------------------


def _axes(theme: Theme, x: str, y: str, *, size: tuple[float, float] = SIZE, grid: bool = True) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, dpi=PIXELS_PER_INCH, layout="constrained", facecolor=theme.background)
    axes = figure.add_subplot(facecolor=theme.background)
    _style(axes, theme, x, y, grid=grid)
    return figure, axes


def _style(axes: Axes, theme: Theme, x: str, y: str, *, grid: bool = True) -> None:
    axes.set_xlabel(x, color=theme.muted, fontsize=FONT)
    axes.set_ylabel(y, color=theme.muted, fontsize=FONT)
    axes.tick_params(colors=theme.muted, labelsize=FONT, length=0, pad=5)
    for name, side in axes.spines.items():
        side.set_visible(name == "bottom")
        side.set_color(theme.muted)
    if grid:
        axes.grid(axis="y", color=theme.grid, linewidth=0.9)
        axes.set_axisbelow(True)


def _legend(axes: Axes, theme: Theme, handles: Sequence[Any]) -> None:
    """Above the axes, where it hides nothing."""
    axes.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=len(handles), frameon=False,
        fontsize=FONT, labelcolor=theme.ink, handlelength=1.5, handletextpad=0.5, columnspacing=1.4, borderpad=0.2,
    )  # fmt: skip


def _line(colour: str, label: str) -> Line2D:
    return Line2D([], [], color=colour, linewidth=1.9, marker="o", markersize=4.5, label=label)


def _task_ticks(axes: Axes, tasks: int) -> None:
    """Whole numbers, and every task where there is room."""
    if tasks <= 12:
        axes.set_xticks(range(tasks))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))


def _readable(colour: Sequence[float], theme: Theme) -> str:
    """Of the theme's ink and background the one that stands out more on `colour` (RGB in 0..1)."""

    def luminance(rgb: Sequence[float]) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb[:3]]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(name: str) -> float:
        """WCAG 2 contrast ratio, 1..21."""
        dark, bright = sorted([luminance(colour), luminance(to_rgb(name))])
        return (bright + 0.05) / (dark + 0.05)

    return max((theme.ink, theme.background), key=contrast)
