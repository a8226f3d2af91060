"""Methods side by side: memory, and accuracy over memory."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from math import isnan
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from simulations.reports.plots.style import FONT, LIGHT, NARROW, PIXELS_PER_INCH, SIZE, Theme, plot_axes, style_axes

PART_COLORS: Mapping[str, str] = {
    "parameters": "#33475b", "gradients": "#6f8396", "optimizer state": "#a9b6c6", "kept activations": "#1b8a7a",
    "frozen part": "#7cc4b5", "temporaries": "#e3c567", "buffer": "#c8566b", "weight copies": "#8c4a86",
    "patterns": "#b98fc9", "statistics": "#5b8fd6", "masks": "#3f2b6b",
}  # fmt: skip
"""Grays: as large as the weights; greens: activations; the other colors: what methods add."""


def footprint_bars(parts: Mapping[str, Mapping[str, int]], measured: Mapping[str, int], theme: Theme) -> Figure:
    """`parts[method][category]`: bytes, stacked from left to right; `measured[method]`: bytes, as a mark on the bar.

    The number beside a bar is the measured one, where there is one.
    """
    names = list(parts)
    figure, axes = plot_axes(
        theme, "memory of a training step (MiB)", "", size=(SIZE[0] + 1.6, 1.5 + 0.36 * len(names))
    )
    axes.grid(visible=False, axis="y")
    axes.grid(axis="x", color=theme.grid, linewidth=0.9)
    places = np.arange(len(names))
    base = np.zeros(len(names))
    handles: list[Any] = []
    for category, color in PART_COLORS.items():
        widths = np.array([parts[name].get(category, 0) for name in names]) / 2**20
        # A part too thin to see would only add a color to the legend.
        if widths.max() > 0.004 * max(sum(p.values()) for p in parts.values()) / 2**20:
            axes.barh(places, widths, 0.62, left=base, color=color, zorder=2, edgecolor=theme.background, linewidth=0.6)
            handles.append(Patch(color=color, label=category))
        base = base + widths
    for place, name, total in zip(places, names, base, strict=True):
        shown = measured[name] / 2**20 if name in measured else total
        end = max(total, shown)
        axes.annotate(
            f"{shown:.0f}" if base.max() >= 100 else f"{shown:.1f}",
            (end, place),
            (6, 0),
            textcoords="offset points",
            va="center",
            color=theme.ink,
            fontsize=FONT,
        )
        if name in measured:
            at = measured[name] / 2**20
            axes.vlines(at, place - 0.42, place + 0.42, color=theme.ink, linewidth=1.8, zorder=3)
    if measured:
        handles.append(Line2D([], [], color=theme.ink, linewidth=1.8, marker="", label="measured"))
    axes.set_yticks(places, names)
    axes.tick_params(axis="y", labelcolor=theme.ink)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.09 * max(base.max(), max(measured.values(), default=0) / 2**20))
    figure.legend(
        handles=handles, loc="outside upper left", ncols=min(5, len(handles)), frameon=False, fontsize=FONT,
        labelcolor=theme.ink, handlelength=1.2, handletextpad=0.5, columnspacing=1.4,
    )  # fmt: skip
    return figure


MARKERS = "osD^vP*X<>hp8d"
METHOD_COLORS = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#33475b", "#e69f00", "#56b4e9", "#8c4a86", "#b4a800", "#a0522d",
    "#7f8c8d", "#c8566b", "#1b8a7a", "#6a5acd",
)  # fmt: skip
METHOD_COLORS_DARK = (
    "#56b4e9", "#f08a3c", "#2fc79a", "#e59bc6", "#a9b6c6", "#f2c14e", "#9fd8ff", "#c58ac0", "#d8cc3c", "#cf8f66",
    "#b8c4c5", "#ee8d9d", "#5fcabb", "#a79cf0",
)  # fmt: skip
"""The same hues, light enough for a dark page."""


def colors_of(names: Sequence[str], theme: Theme) -> dict[str, str]:
    """A color for each name, in order. Neighbors differ in lightness as well as hue."""
    palette = METHOD_COLORS if theme == LIGHT else METHOD_COLORS_DARK
    return {name: palette[index % len(palette)] for index, name in enumerate(names)}


STEP_MEMORY = "memory of a training step, measured (MiB)"


def accuracy_over_memory(
    points: Mapping[str, Mapping[str, tuple[float, float, float]]], theme: Theme, memory_label: str = STEP_MEMORY,
    *, narrow: bool = False,
) -> Figure:  # fmt: skip
    """`points[setting][method]`: (memory in MiB, mean accuracy, its error bar), accuracies in 0..1.

    One panel per setting ("cil", "til"), side by side or, narrow, one below the other; a NaN error bar is not drawn. Up
    and to the left is better.
    """
    shown = {setting: values for setting, values in points.items() if values}
    names = list(dict.fromkeys(name for values in shown.values() for name in values))
    # Without this space the second panel's label touches the first panel.
    layout = ConstrainedLayoutEngine(hspace=0.06) if narrow else ConstrainedLayoutEngine(wspace=0.05)
    size = (NARROW, 2.9 * len(shown) + 0.3 + 0.2 * len(names)) if narrow else (9.8, 4.0)
    figure = Figure(figsize=size, dpi=PIXELS_PER_INCH, layout=layout, facecolor=theme.background)
    colors = colors_of(names, theme)
    markers = {name: MARKERS[index % len(MARKERS)] for index, name in enumerate(names)}
    for place, (setting, values) in enumerate(shown.items()):
        grid = (len(shown), 1) if narrow else (1, len(shown))
        axes = figure.add_subplot(*grid, 1 + place, facecolor=theme.background)
        style_axes(axes, theme, memory_label, f"{setting.upper()} accuracy (%)")
        for name, (memory, mean, deviation) in values.items():
            error = None if isnan(deviation) else 100 * deviation
            axes.errorbar(
                memory, 100 * mean, yerr=error, color=colors[name], marker=markers[name], markersize=8, linestyle="",
                elinewidth=1.2, capsize=2.5, markeredgecolor=theme.background, markeredgewidth=0.7, clip_on=False,
            )  # fmt: skip
        axes.set_xlim(left=0)
        ticks = axes.yaxis.get_major_locator().tick_values(*axes.dataLim.intervaly)
        axes.set_ylim(max(0, ticks[0]), min(100, ticks[-1]))  # full steps: no point lies above the last number
    handles = [
        Line2D([], [], color=colors[n], marker=markers[n], markersize=7, linestyle="", label=wrapped(n)) for n in names
    ]
    figure.legend(
        handles=handles, loc="outside upper left" if narrow else "outside right center", frameon=False, fontsize=FONT,
        labelcolor=theme.ink, handletextpad=0.4, labelspacing=0.7,
    )  # fmt: skip
    return figure


def wrapped(label: str) -> str:
    """The label, wrapped so that it fits into a legend."""
    return textwrap.fill(label, 30, break_on_hyphens=False, max_lines=3, placeholder=" …")
