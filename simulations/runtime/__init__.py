"""Engines that run a ServerApp and the devices' ClientApp on this machine or on a Ray cluster.

`simulation.engine: ray` hands messages to Ray actors through a `Grid` of this project (`ray_grid`, `ray_engine`);
`flower` is Flower's own simulation engine (`flower_engine`). Both run the same two apps and give the same numbers.
Ray, Flower and PyTorch are imported only when a simulation starts: a worker loads this module first, and its threads
must be limited before PyTorch is imported.
"""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from simulations.runtime.address import check_reachable
from simulations.runtime.gpus import gpu_share

if TYPE_CHECKING:
    from flwr.serverapp import ServerApp

    from lightcl.scenario import Scenario

__all__ = ["check_cluster", "gpu_share", "simulate"]


def check_cluster(scenario: Scenario) -> None:
    """Raises RequestError if `simulation.address` names a cluster that cannot be reached. Takes milliseconds."""
    if scenario.simulation.address is not None:
        check_reachable(scenario.simulation.address)


def simulate(server: ServerApp, state: Path, scenario: Scenario) -> None:
    """Run `server` over the scenario's devices, which keep their states in the folder `state`.

    Raises the ServerApp's exception, RequestError if the cluster of `simulation.address` cannot run the devices, and
    KeyboardInterrupt after SIGINT or SIGTERM. It leaves no process behind.
    """
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Workers of a local Ray inherit it; otherwise each would start one thread per core.
    os.environ["OMP_NUM_THREADS"] = str(scenario.device.threads)
    # A failure reaches the server as an error reply, or the caller as an exception. Flower's log would repeat it and,
    # after an interruption, list every message that the end of Ray cuts off.
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    warnings.filterwarnings("ignore", category=FutureWarning, module="ray")
    if scenario.simulation.engine == "flower":
        from simulations.runtime.flower_engine import run
    else:
        from simulations.runtime.ray_engine import run
    run(server, state, scenario)
    logger.setLevel(level)  # not after an exception: threads of Flower's engine may outlive one, and log
