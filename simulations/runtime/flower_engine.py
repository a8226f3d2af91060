"""Flower's own simulation engine.

`run_simulation` runs in this process, so an exception of the ServerApp is raised here and no daemon is left behind.
It is marked deprecated in favor of `flwr run`, hence the pinned flwr and this small module. Its cost per round grows
with nodes x messages: use it for fleets of a few hundred devices.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.simulation import run_simulation

from lightcl.scenario import Scenario
from simulations.runtime.devices import make_app
from simulations.runtime.gpus import gpu_share
from simulations.runtime.ray_engine import connected


def run(
    server: ServerApp, state: Path, scenario: Scenario, make_client: Callable[[Path], ClientApp] = make_app
) -> None:
    """Run `server` over one virtual node per device. Raises the ServerApp's exception."""
    workers = scenario.simulation.workers
    gpus = torch.cuda.device_count() if scenario.device.accelerator != "cpu" and torch.cuda.is_available() else 0
    try:
        with connected(scenario):  # Flower's engine takes the Ray that is there
            run_simulation(
                server_app=server,
                client_app=make_client(state),
                num_supernodes=scenario.fleet.devices,
                backend_config={
                    "client_resources": {"num_cpus": 1, "num_gpus": gpu_share(gpus, workers) if gpus else 0.0}
                },
            )
    except SystemExit as error:  # Ray turns SIGTERM into it
        raise KeyboardInterrupt from error
