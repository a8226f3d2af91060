"""Plots of what boards measured: one line per device over the rounds, with limits, throttling and back-off marked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from lightcl.errors import one_line
from simulations.reports.plots.style import Theme, legend_above, plot_axes

COLORS = ("#009e73", "#cc79a7", "#e69f00", "#8f7ae0", "#8c8c46", "#7f8c8d")
"""Of the devices; none of them is a setting's. With more devices all lines are gray."""
LONGEST_NAME = 24
ALARM = "#c0392b"


@dataclass(frozen=True)
class Measured:
    """One value of a device in a round, and what happened to the device in it."""

    round: int
    value: float
    throttled: bool = False
    backed_off: bool = False


def measured_over_rounds(
    devices: Mapping[str, Sequence[Measured]], label: str, limits: Sequence[float], theme: Theme
) -> Figure:
    """`devices[name]`: the values of a device by round, empty where it has none; `limits`: horizontal lines.

    A device has the same color wherever the same devices are given.
    """
    figure, axes = plot_axes(theme, "round", label)
    few = len(devices) <= len(COLORS)
    handles: list[Any] = []
    for number, (name, values) in enumerate(devices.items()):
        if not values:
            continue
        color = COLORS[number] if few else theme.muted
        rounds, heights = [v.round for v in values], [v.value for v in values]
        axes.plot(
            rounds, heights, color=color, linewidth=1.7 if few else 0.8, alpha=1 if few else 0.5,
            marker="o" if len(values) <= 30 else None, markersize=3.5,
        )  # fmt: skip
        if few:
            handles.append(Line2D([], [], color=color, linewidth=1.7, label=one_line(name, LONGEST_NAME)))
    everything = [value for values in devices.values() for value in values]
    marks = (("throttled", "v", [v for v in everything if v.throttled]),
             ("backed off", "X", [v for v in everything if v.backed_off]))  # fmt: skip
    for name, marker, found in marks:
        if found:
            style: dict[str, Any] = {
                "color": ALARM,
                "marker": marker,
                "markersize": 7,
                "markeredgecolor": theme.background,
            }
            axes.plot([v.round for v in found], [v.value for v in found], linestyle="none", zorder=4, **style)
            handles.append(Line2D([], [], linestyle="none", label=name, **style))
    for limit in limits:
        axes.axhline(limit, color=ALARM, linewidth=1.1, linestyle=(0, (4, 3)))
    if limits:
        handles.append(Line2D([], [], color=ALARM, linewidth=1.1, linestyle=(0, (4, 3)), label="limit"))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12, min_n_ticks=1))
    axes.set_ylim(*_range([v.value for v in everything] + list(limits)))
    if handles:
        legend_above(axes, theme, handles, columns=min(3, len(handles)))
    return figure


def _range(values: Sequence[float]) -> tuple[float, float]:
    """From zero where the values begin near it; otherwise with room around them."""
    low, high = min(values), max(values)
    room = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    return (0.0 if 0 <= low < 0.5 * high else low - room), high + room
