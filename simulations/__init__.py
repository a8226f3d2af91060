"""The command line, the simulated fleet, sweeps and reports. `run_fleet` is the part for notebooks and scripts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from simulations.fleet import run_fleet

__all__ = ["run_fleet"]


def __getattr__(name: str) -> Any:
    if name != "run_fleet":
        raise AttributeError(f"module 'simulations' has no attribute {name!r}")
    from simulations.fleet import run_fleet  # imports PyTorch and Flower, which `lightcl --help` does not need

    return run_fleet
