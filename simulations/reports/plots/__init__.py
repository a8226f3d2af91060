"""Figures by subject: one run, a large fleet, methods side by side, runs side by side, the blocks of a network."""

from simulations.reports.plots.blocks import generalizability
from simulations.reports.plots.boards import Measured, measured_over_rounds
from simulations.reports.plots.comparison import (
    accuracy_of_runs,
    differences_of_runs,
    forgetting_of_runs,
    gains_by_class,
)
from simulations.reports.plots.fleet import (
    accuracy_by_images,
    accuracy_by_tasks_learned,
    distribution,
    skipped_tasks,
)
from simulations.reports.plots.methods import STEP_MEMORY, accuracy_over_memory, footprint_bars
from simulations.reports.plots.run import (
    accuracy_matrix,
    accuracy_over_tasks,
    bytes_per_round,
    forgetting_per_task,
    seconds_per_round,
)
from simulations.reports.plots.style import DARK, LIGHT, THEMES, Theme, png

__all__ = [
    "DARK", "LIGHT", "STEP_MEMORY", "THEMES", "Measured", "Theme", "accuracy_by_images", "accuracy_by_tasks_learned",
    "accuracy_matrix", "accuracy_of_runs", "accuracy_over_memory", "accuracy_over_tasks", "bytes_per_round",
    "differences_of_runs", "distribution", "footprint_bars", "forgetting_of_runs", "forgetting_per_task",
    "gains_by_class", "generalizability", "measured_over_rounds", "png", "seconds_per_round", "skipped_tasks",
]  # fmt: skip
