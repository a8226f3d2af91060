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
from simulations.reports.plots.style import FONT, LIGHT, NARROW, PIXELS_PER_INCH, Theme, style_axes, task_ticks
from simulations.reports.statistics import Difference

T = TypeVar("T")

WIDE = (9.8, 4.0)
"""Inches of a figure with two panels and a legend beside them."""
MORE, LESS = ("#2fc79a", "#009e73"), ("#e59bc6", "#b3387f")
"""Of a difference that is clearly above or below zero, on a dark and on a light page; told apart with every color
vision, and not the colors of TIL and CIL."""


WIDEST_MARGIN = 25.0
"""Half of the widest interval, in points, that a figure of gains by class makes room for."""


def accuracy_of_runs(
    curves: Mapping[str, Mapping[str, Sequence[float]]],
    chance: Mapping[str, float],
    theme: Theme,
    *,
    narrow: bool = False,
) -> Figure:
    """`curves[setting][label][t]`: average accuracy (0..1) on tasks 0..t after task t; one panel per setting.

    NaN, where there was no test, is left out. `chance[setting]` is what guessing gives.
    """
    figure, names = _panels(curves, theme, narrow=narrow)
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
    _legend(figure, handles, theme, narrow=narrow)
    return figure


def forgetting_of_runs(
    bars: Mapping[str, Mapping[str, tuple[float, float]]], theme: Theme, *, narrow: bool = False
) -> Figure:
    """`bars[setting][label]`: mean forgetting (0..1) and its standard error (NaN: no whisker); a panel per setting."""
    shown = _shown(bars)
    names = list(dict.fromkeys(name for values in shown.values() for name in values))
    height = max(2.2, 1.2 + 0.34 * len(names))
    figure, names = _panels(bars, theme, height, narrow=narrow)
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
    _legend(figure, [Patch(color=colors[n], label=wrapped(n)) for n in names], theme, narrow=narrow)
    return figure


def differences_of_runs(
    differences: Mapping[str, Mapping[str, tuple[Difference, Difference | None]]], labels: Mapping[str, str],
    baselines: Mapping[str, str], theme: Theme, *, narrow: bool = False,
) -> Figure:  # fmt: skip
    """`differences[setting][label]`: the difference from the baseline over pairs and, where devices share something,
    over the means of each seed (0..1); a panel per setting.

    `labels[label]` stands beside the row, `baselines[label]` above the rows that have the same one. A row is colored
    where no interval holds zero.
    """
    shown = _shown(differences)
    names = list(dict.fromkeys(name for values in shown.values() for name in values))
    rows: dict[str, float] = {}
    heads: dict[str, float] = {}
    place = 0.0
    for base in dict.fromkeys(baselines[name] for name in names):
        heads[base] = place
        for name in [name for name in names if baselines[name] == base]:
            place += 1
            rows[name] = place
        place += 1.35
    figure = Figure(
        figsize=(NARROW, (0.8 + 0.21 * place) * len(shown) + 0.3) if narrow else (WIDE[0], 1.0 + 0.21 * place),
        dpi=PIXELS_PER_INCH, layout=_layout(narrow=narrow), facecolor=theme.background,
    )  # fmt: skip
    kinds = {"higher": MORE[theme == LIGHT], "lower": LESS[theme == LIGHT], "not clear": theme.muted}
    first = None
    for number, (setting, values) in enumerate(shown.items()):
        axes = first = figure.add_subplot(
            *_place(number, len(shown), narrow=narrow), facecolor=theme.background, sharey=first
        )
        style_axes(axes, theme, f"{setting.upper()} accuracy minus the baseline's (points)", "", grid=False)
        axes.grid(axis="x", color=theme.grid, linewidth=0.9)
        axes.set_axisbelow(True)
        axes.axvline(0, color=theme.ink, linewidth=1.0, zorder=2)
        for name, (pairs, seeds) in values.items():
            known = [d for d in (pairs, seeds) if d and not isnan(d.low)]
            kind = "not clear"
            if known and all(d.clear for d in known):
                kind = "higher" if pairs.mean > 0 else "lower"
            for d, width in zip((seeds, pairs), (1.1, 4.0), strict=True):
                if d and not isnan(d.low):
                    axes.hlines(rows[name], 100 * d.low, 100 * d.high, color=kinds[kind], linewidth=width, zorder=3)
            axes.plot(
                100 * pairs.mean, rows[name], "o", color=kinds[kind], markersize=6.5, zorder=4,
                markeredgecolor=theme.background, markeredgewidth=0.8,
            )  # fmt: skip
        if number == 0 or narrow:
            axes.set_yticks([*rows.values(), *heads.values()], [*(labels[n] for n in rows), *heads])
            for tick, head in zip(axes.get_yticklabels(), [False] * len(rows) + [True] * len(heads), strict=True):
                tick.set_color(theme.muted if head else theme.ink)
                tick.set_fontstyle("italic" if head else "normal")
        else:
            axes.tick_params(axis="y", labelleft=False)
        axes.set_ylim(place - 0.7, -0.7)
    handles = [Line2D([], [], color=c, marker="o", markersize=6, linewidth=4, label=k) for k, c in kinds.items()]
    figure.legend(
        handles=handles, loc="outside upper right", ncols=len(handles), frameon=False, fontsize=FONT,
        labelcolor=theme.ink, handletextpad=0.5, columnspacing=1.4,
    )  # fmt: skip
    return figure


def gains_by_class(
    panels: Mapping[str, Mapping[str, Sequence[Difference | None]]], classes: Sequence[str], x: str, y: str,
    theme: Theme, *, narrow: bool = False,
) -> Figure:  # fmt: skip
    """`panels[baseline][label][class]`: difference (0..1) from the baseline; whiskers are the 95 % interval.

    Three panels in a row, on a narrow screen one, all with the same axes.
    """
    columns = 1 if narrow else min(3, len(panels))
    lines = -(-len(panels) // columns)
    names = list(dict.fromkeys(name for values in panels.values() for name in values))
    colors = colors_of(names, theme)
    figure = Figure(
        figsize=(NARROW if narrow else 3.3 * columns, 0.9 + 2.1 * lines), dpi=PIXELS_PER_INCH, layout="constrained",
        facecolor=theme.background,
    )  # fmt: skip
    first = None
    ends = [0.0]  # of what the panels show; an interval of a few devices that is wider goes beyond
    for number, (base, values) in enumerate(panels.items()):
        axes = figure.add_subplot(lines, columns, 1 + number, facecolor=theme.background, sharex=first, sharey=first)
        first = first or axes
        style_axes(axes, theme, x if number // columns == lines - 1 else "", y if number % columns == 0 else "")
        axes.set_title(f"over {base}", fontsize=FONT, color=theme.ink, loc="left")
        axes.axhline(0, color=theme.ink, linewidth=1.0, zorder=2)
        for index, (name, gained) in enumerate(values.items()):
            shift = 0.13 * (index - (len(values) - 1) / 2)
            known = [(place + shift, d) for place, d in enumerate(gained) if d]
            heights = [100 * d.mean for _, d in known]
            margins = [0.0 if isnan(d.low) else 100 * (d.high - d.mean) for _, d in known]
            within = [min(margin, WIDEST_MARGIN) for margin in margins]
            ends += [h + sign * m for h, m in zip(heights, within, strict=True) for sign in (-1, 1)]
            axes.errorbar(
                [at for at, _ in known], heights, yerr=margins, color=colors[name], marker=_marker(names, name),
                markersize=5, linewidth=1.5, elinewidth=1.2, zorder=3, markeredgecolor=theme.background,
                markeredgewidth=0.6,
            )  # fmt: skip
        axes.set_xticks(range(len(classes)), classes)
        if len(classes) > 5:  # "100–199" is as wide as a fifth of a panel
            axes.tick_params(axis="x", labelrotation=35)
        axes.set_xlim(-0.5, len(classes) - 0.5)
    if first is not None:
        room = 0.06 * (max(ends) - min(ends)) or 1.0
        first.set_ylim(min(ends) - room, max(ends) + room)
    handles = [
        Line2D([], [], color=colors[n], marker=_marker(names, n), markersize=6, linewidth=1.5, label=n) for n in names
    ]
    figure.legend(
        handles=handles, loc="outside upper right", ncols=1 if narrow else len(handles), frameon=False, fontsize=FONT,
        labelcolor=theme.ink, handletextpad=0.5, columnspacing=1.4,
    )  # fmt: skip
    return figure


def _shown(panels: Mapping[str, Mapping[str, T]]) -> dict[str, Mapping[str, T]]:
    return {setting: values for setting, values in panels.items() if values}


def _panels(
    panels: Mapping[str, Mapping[str, T]], theme: Theme, height: float = WIDE[1], *, narrow: bool
) -> tuple[Figure, list[str]]:
    """A figure with a panel per setting, side by side or, narrow, one below the other; and the names in them."""
    shown = _shown(panels)
    names = list(dict.fromkeys(name for values in shown.values() for name in values))
    size = (NARROW, min(height, 2.9) * len(shown) + 0.3 + 0.2 * len(names)) if narrow else (WIDE[0], height)
    figure = Figure(figsize=size, dpi=PIXELS_PER_INCH, layout=_layout(narrow=narrow), facecolor=theme.background)
    for number in range(len(shown)):
        figure.add_subplot(*_place(number, len(shown), narrow=narrow), facecolor=theme.background)
    return figure, names


def _layout(*, narrow: bool) -> ConstrainedLayoutEngine:
    return ConstrainedLayoutEngine(hspace=0.06) if narrow else ConstrainedLayoutEngine(wspace=0.05)


def _place(number: int, count: int, *, narrow: bool) -> tuple[int, int, int]:
    """The arguments of `add_subplot` for one of `count` panels."""
    return (count, 1, 1 + number) if narrow else (1, count, 1 + number)


def _marker(names: Sequence[str], name: str) -> str:
    return MARKERS[names.index(name) % len(MARKERS)]


def _legend(figure: Figure, handles: Sequence[Line2D | Patch], theme: Theme, *, narrow: bool) -> None:
    figure.legend(
        handles=list(handles), loc="outside upper left" if narrow else "outside right center", frameon=False,
        fontsize=FONT, labelcolor=theme.ink, handletextpad=0.5, labelspacing=0.7,
    )  # fmt: skip
