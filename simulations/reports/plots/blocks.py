"""The blocks of a network: how general each is."""

from __future__ import annotations

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from lightcl.analysis.generalizability import Generalizability
from simulations.reports.plots.style import FONT, PIXELS_PER_INCH, Theme, legend_line, style_axes


def generalizability(found: Generalizability, threshold: float, theme: Theme) -> Figure:
    """Memory stability, learning plasticity and readiness of every block: one line per task, and their mean.

    Tinted blocks are those that `threshold` freezes. Readiness does not affect this, so its panel shows no threshold.
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
    colors = [shades(task / max(1, tasks - 1)) for task in range(tasks)]
    few = tasks <= 5
    for place, (kind, values) in enumerate(kinds.items()):
        axes = figure.add_subplot(1, 3, 1 + place, facecolor=theme.background)
        style_axes(axes, theme, "", "linear CKA" if place == 0 else "")
        axes.set_title(kind, color=theme.ink, fontsize=FONT + 1, loc="left", pad=8)
        if frozen:
            axes.axvspan(-0.5, frozen - 0.5, color=theme.pale, zorder=0, linewidth=0)
        if place < 2:
            axes.axhline(threshold, color=theme.muted, linewidth=1.1, linestyle=(0, (4, 3)))
        for task, line in enumerate(np.array(values).T):
            axes.plot(line, color=colors[task], linewidth=1.1)
        axes.plot(np.mean(values, 1), color=theme.ink, linewidth=2.2, marker="o", markersize=4.5)
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_xlim(-0.5, len(names) - 0.5)
        axes.set_ylim(max(0.0, min(lowest, threshold) - 0.05), 1.01)
    shown = range(tasks) if few else (0, tasks - 1)
    handles = [Line2D([], [], color=colors[t], linewidth=1.4, label=f"task {t + 1}") for t in shown]
    handles += [legend_line(theme.ink, "mean")]
    handles += [
        Line2D([], [], color=theme.muted, linewidth=1.1, linestyle=(0, (4, 3)), label=f"threshold {threshold:g}")
    ]
    patches = [Patch(color=theme.pale, label=f"frozen: up to {point}")] if frozen else []
    figure.legend(
        handles=[*handles, *patches], loc="outside lower left", ncols=len(handles) + len(patches), frameon=False,
        fontsize=FONT, labelcolor=theme.ink, handlelength=1.5, handletextpad=0.5, columnspacing=1.2,
    )  # fmt: skip
    return figure
