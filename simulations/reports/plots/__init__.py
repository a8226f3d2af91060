"""Figures by subject: one run, methods side by side, runs side by side, the blocks of a network."""

from simulations.reports.plots.blocks import generalizability
from simulations.reports.plots.comparison import accuracy_of_runs, forgetting_of_runs
from simulations.reports.plots.methods import STEP_MEMORY, accuracy_over_memory, footprint_bars
from simulations.reports.plots.run import (
    accuracy_matrix,
    accuracy_over_tasks,
    bytes_per_round,
    forgetting_per_task,
    seconds_per_round,
)
from simulations.reports.plots.style import DARK, LIGHT, Theme, png

__all__ = [
    "DARK", "LIGHT", "STEP_MEMORY", "Theme", "accuracy_matrix", "accuracy_of_runs", "accuracy_over_memory",
    "accuracy_over_tasks", "bytes_per_round", "footprint_bars", "forgetting_of_runs", "forgetting_per_task",
    "generalizability", "png", "seconds_per_round",
]  # fmt: skip
