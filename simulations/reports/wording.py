"""How pages and tables show numbers. The only place that formats accuracies, differences, times and sizes."""

from __future__ import annotations

from math import isnan

from simulations.reports.statistics import Difference

DASH = "–"
"""Shown where there is no figure."""


def percent(value: float) -> str:
    """An accuracy in 0..1 as %, without the sign."""
    return DASH if isnan(value) else f"{100 * value:.1f}"


def points(value: float) -> str:
    """A difference of accuracies in percentage points, without the unit."""
    # Adding 0.0 turns a rounded -0.0 into 0.0.
    return DASH if isnan(value) else minus(f"{round(100 * value, 1) + 0.0:.1f}")


def signed_points(value: float) -> str:
    """A difference of accuracies in percentage points, with its sign."""
    return DASH if isnan(value) else minus(f"{round(100 * value, 1) + 0.0:+.1f}")


def interval_text(found: Difference | None) -> str:
    """A difference of accuracies in percentage points with its 95 % interval, where it has one."""
    if found is None:
        return DASH
    interval = "" if isnan(found.low) else f" [{signed_points(found.low)}, {signed_points(found.high)}]"
    return f"{signed_points(found.mean)}{interval}"


def minus(text: str) -> str:
    """The text with minus signs instead of hyphens."""
    return text.replace("-", "−")


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f}\u00a0s"
    if seconds < 7200:
        return f"{seconds // 60:.0f}\u00a0min\u00a0{seconds % 60:02.0f}\u00a0s"
    return f"{seconds // 3600:.0f}\u00a0h\u00a0{seconds % 3600 // 60:02.0f}\u00a0min"


def size(count: float) -> str:
    """Bytes in decimal units."""
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= factor:
            return f"{count / factor:.1f}\u00a0{unit}"
    return f"{count:.0f}\u00a0bytes"


def energy(joules: float | None) -> str:
    """Joules in a unit that fits; a dash where the energy is not known."""
    if joules is None:
        return DASH
    for factor, unit in ((1e6, "MJ"), (1e3, "kJ")):
        if joules >= factor:
            return f"{joules / factor:.2f}\u00a0{unit}"
    return f"{joules:.1f}\u00a0J"
