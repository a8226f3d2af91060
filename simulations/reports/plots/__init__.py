"""Figures, by what they are of: a run, methods side by side, the blocks of a network."""

from simulations.reports.plots.blocks import generalizability
from simulations.reports.plots.methods import accuracy_over_memory, footprint_bars
from simulations.reports.plots.run import (
    accuracy_matrix,
    accuracy_over_tasks,
    bytes_per_round,
    forgetting_per_task,
    seconds_per_round,
)
from simulations.reports.plots.style import DARK, LIGHT, Theme, png

__all__ = [
    "DARK", "LIGHT", "Theme", "accuracy_matrix", "accuracy_over_memory", "accuracy_over_tasks", "bytes_per_round",
    "footprint_bars", "forgetting_per_task", "generalizability", "png", "seconds_per_round",
]  # fmt: skip
