"""The figures of a comparison: runs side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isnan
from typing import TypeVar

import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from simulations.reports.plots.methods import MARKERS, colors_of, wrapped
from simulations.reports.plots.style import FONT, PIXELS_PER_INCH, Theme, style_axes, task_ticks

T = TypeVar("T")

WIDE = (9.8, 4.0)
"""Inches of a figure with two panels and a legend beside them."""


def accuracy_of_runs(
    curves: Mapping[str, Mapping[str, Sequence[float]]], chance: Mapping[str, float], theme: Theme
) -> Figure:
    """`curves[setting][label][t]`: average accuracy (0..1) on tasks 0..t after task t; one panel per setting.

    NaN, where there was no test, is left out. `chance[setting]` is what guessing gives.
    """
    figure, names = _panels(curves, theme)
    colors = colors_of(names, theme)
    for axes, (setting, values) in zip(figure.axes, _shown(curves).items(), strict=True):
        style_axes(axes, theme, "after task", f"{setting.upper()} average accuracy (%)")
        for name, curve in values.items():
            heights = 100 * np.asarray(curve, dtype=float)
            places = np.flatnonzero(~np.isnan(heights))
            axes.plot(
                places, heights[places], color=colors[name], linewidth=1.9, marker=_marker(names, name), markersize=5.5,
                markeredgecolor=theme.background, markeredgewidth=0.6,
            )  # fmt: skip
        if setting in chance:
            axes.axhline(100 * chance[setting], color=theme.muted, linewidth=1.1, linestyle=(0, (4, 3)))
        axes.set_ylim(0, 102)
        task_ticks(axes, max(len(curve) for curve in values.values()))
    handles = [
        Line2D([], [], color=colors[n], marker=_marker(names, n), markersize=6, linewidth=1.9, label=wrapped(n))
        for n in names
    ]
    if chance:
        handles.append(Line2D([], [], color=theme.muted, linewidth=1.1, linestyle=(0, (4, 3)), label="chance"))
    _legend(figure, handles, theme)
    return figure


def forgetting_of_runs(bars: Mapping[str, Mapping[str, tuple[float, float]]], theme: Theme) -> Figure:
    """`bars[setting][label]`: mean forgetting (0..1) and its standard error (NaN: no whisker); a panel per setting."""
    shown = _shown(bars)
    names = list(dict.fromkeys(name for values in shown.values() for name in values))
    height = max(2.2, 1.2 + 0.34 * len(names))
    figure, names = _panels(bars, theme, height)
    colors = colors_of(names, theme)
    for axes, (setting, values) in zip(figure.axes, shown.items(), strict=True):
        style_axes(axes, theme, f"{setting.upper()} forgetting (percentage points)", "", grid=False)
        axes.grid(axis="x", color=theme.grid, linewidth=0.9)
        axes.set_axisbelow(True)
        for name, (mean, error) in values.items():
            axes.barh(
                names.index(name), 100 * mean, 0.62, color=colors[name], zorder=2,
                xerr=None if isnan(error) else 100 * error, ecolor=theme.ink,
                error_kw={"elinewidth": 1.1, "capsize": 2.5},
            )  # fmt: skip
        axes.set_yticks([])
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.axvline(0, color=theme.muted, linewidth=0.9, zorder=4)
    _legend(figure, [Patch(color=colors[n], label=wrapped(n)) for n in names], theme)
    return figure


def _shown(panels: Mapping[str, Mapping[str, T]]) -> dict[str, Mapping[str, T]]:
    return {setting: values for setting, values in panels.items() if values}


def _panels(panels: Mapping[str, Mapping[str, T]], theme: Theme, height: float = WIDE[1]) -> tuple[Figure, list[str]]:
    shown = _shown(panels)
    layout = ConstrainedLayoutEngine(wspace=0.05)
    figure = Figure(figsize=(WIDE[0], height), dpi=PIXELS_PER_INCH, layout=layout, facecolor=theme.background)
    for place in range(len(shown)):
        figure.add_subplot(1, len(shown), 1 + place, facecolor=theme.background)
    return figure, list(dict.fromkeys(name for values in shown.values() for name in values))


def _marker(names: Sequence[str], name: str) -> str:
    return MARKERS[names.index(name) % len(MARKERS)]


def _legend(figure: Figure, handles: Sequence[Line2D | Patch], theme: Theme) -> None:
    figure.legend(
        handles=list(handles), loc="outside right center", frameon=False, fontsize=FONT, labelcolor=theme.ink,
        handletextpad=0.5, labelspacing=0.7,
    )  # fmt: skip
