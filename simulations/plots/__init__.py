"""Figures, by what they are of: a run, methods side by side, the blocks of a network."""

from simulations.plots.blocks import generalizability
from simulations.plots.methods import accuracy_over_memory, footprint_bars
from simulations.plots.run import (
    accuracy_matrix,
    accuracy_over_tasks,
    bytes_per_round,
    forgetting_per_task,
    seconds_per_round,
)
from simulations.plots.style import DARK, LIGHT, Theme, png

__all__ = [
    "DARK", "LIGHT", "Theme", "accuracy_matrix", "accuracy_over_memory", "accuracy_over_tasks", "bytes_per_round",
    "footprint_bars", "forgetting_per_task", "generalizability", "png", "seconds_per_round",
]  # fmt: skip
