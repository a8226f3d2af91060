"""What all figures have in common: sizes, two themes, axes and legends.

Every plot is a function of numbers and a theme that returns a new matplotlib `Figure`; pyplot and its global state are
not used. Accuracies are passed in 0..1 and drawn in %; bytes and seconds are drawn in a unit that fits their size.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

SIZE = (5.4, 3.3)
"""Inches. At 96 CSS pixels per inch this is about the width on the page; text stays readable on a phone."""
NARROW = 4.7
"""Inches of width of a figure for a screen of at most 600 CSS pixels."""
PIXELS_PER_INCH = 192
"""Twice the CSS pixels, for dense screens."""
FONT = 9.0


@dataclass(frozen=True)
class Theme:
    """Colors as hex. TIL and CIL are the blue and vermilion of Okabe & Ito, safe for color blindness.

    `first` and `second` are the parts of a stacked bar; they differ in lightness and are not TIL's and CIL's colors,
    so that no color means two things.
    """

    background: str
    ink: str
    muted: str
    grid: str
    settings: Mapping[str, str]
    first: str
    second: str
    deep: str
    """The heat map's color at 100 %; at 0 % it is close to the background."""
    pale: str


LIGHT = Theme(
    background="#ffffff", ink="#1c2430", muted="#5b6675", grid="#e6e9ee", settings={"til": "#0072b2", "cil": "#d55e00"},
    first="#4a5a70", second="#a9b6c6", deep="#08467a", pale="#f1f5f9",
)  # fmt: skip
DARK = Theme(
    background="#1a2029", ink="#e6eaf0", muted="#9aa5b3", grid="#2d3541", settings={"til": "#56b4e9", "cil": "#f08a3c"},
    first="#93a4ba", second="#4d5b6e", deep="#8fd0f7", pale="#232b36",
)  # fmt: skip
THEMES = (LIGHT, DARK)
"""In the order of `Picture.light` and `Picture.dark`."""


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=PIXELS_PER_INCH, facecolor=figure.get_facecolor())
    return buffer.getvalue()


def plot_axes(
    theme: Theme, x: str, y: str, *, size: tuple[float, float] = SIZE, grid: bool = True
) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, dpi=PIXELS_PER_INCH, layout="constrained", facecolor=theme.background)
    axes = figure.add_subplot(facecolor=theme.background)
    style_axes(axes, theme, x, y, grid=grid)
    return figure, axes


def style_axes(axes: Axes, theme: Theme, x: str, y: str, *, grid: bool = True) -> None:
    axes.set_xlabel(x, color=theme.muted, fontsize=FONT)
    axes.set_ylabel(y, color=theme.muted, fontsize=FONT)
    axes.tick_params(colors=theme.muted, labelsize=FONT, length=0, pad=5)
    for name, side in axes.spines.items():
        side.set_visible(name == "bottom")
        side.set_color(theme.muted)
    if grid:
        axes.grid(axis="y", color=theme.grid, linewidth=0.9)
        axes.set_axisbelow(True)


def legend_above(axes: Axes, theme: Theme, handles: Sequence[Any], columns: int | None = None) -> None:
    """Above the axes, where it hides nothing; in one line, or in this many columns."""
    axes.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=columns or len(handles), frameon=False,
        fontsize=FONT, labelcolor=theme.ink, handlelength=1.5, handletextpad=0.5, columnspacing=1.4, borderpad=0.2,
    )  # fmt: skip


def legend_line(color: str, label: str) -> Line2D:
    return Line2D([], [], color=color, linewidth=1.9, marker="o", markersize=4.5, label=label)


def task_ticks(axes: Axes, tasks: int) -> None:
    """Integers; every task where there is room."""
    if tasks <= 12:
        axes.set_xticks(range(tasks))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))


def readable(color: Sequence[float], theme: Theme) -> str:
    """The theme's ink or background, whichever contrasts more with `color` (RGB in 0..1)."""

    def luminance(rgb: Sequence[float]) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb[:3]]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(name: str) -> float:
        """WCAG 2 contrast ratio, 1..21."""
        dark, bright = sorted([luminance(color), luminance(to_rgb(name))])
        return (bright + 0.05) / (dark + 0.05)

    return max((theme.ink, theme.background), key=contrast)
