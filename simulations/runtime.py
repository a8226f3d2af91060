"""The one place that starts Flower's simulation runtime.

`run_simulation` runs in this process, so an exception of the ServerApp is raised here and no daemon stays behind; Ray
comes only through it. It is marked deprecated in favour of `flwr run`, hence the pinned flwr and this small module.
"""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from math import ceil
from pathlib import Path

from flwr.serverapp import ServerApp

from lightcl.scenario import Scenario


def simulate(server: ServerApp, state: Path, scenario: Scenario) -> None:
    """Runs `server` over the scenario's devices, whose states lie under `state`, on `simulation.workers` Ray workers.

    Raises whatever the ServerApp raised.
    """
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Workers are forked from Ray's own processes; without this each would start as many threads as there are cores.
    os.environ["OMP_NUM_THREADS"] = str(scenario.device.threads)
    # What fails reaches the server as an error reply, or this function as an exception; Flower's log would repeat it,
    # and after an interruption list every message that the end of Ray cuts off.
    logging.getLogger("flwr").setLevel(logging.CRITICAL + 1)
    warnings.filterwarnings("ignore", category=FutureWarning, module="ray")
    from flwr.simulation import run_simulation

    from client.app import make_app

    gpus = _gpu_share(scenario)
    try:
        run_simulation(
            server_app=server,
            client_app=make_app(state),
            num_supernodes=scenario.fleet.devices,
            backend_config={
                "init_args": {
                    "address": "local",  # whatever Ray else runs here, or RAY_ADDRESS names, is not for this run
                    "num_cpus": scenario.simulation.workers,
                    "log_to_driver": False,
                    "logging_level": logging.ERROR,
                    "include_dashboard": False,
                    "configure_logging": False,
                    "_temp_dir": tempfile.gettempdir() + "/ray",
                },
                "client_resources": {"num_cpus": 1, "num_gpus": gpus},
            },
        )
    except SystemExit as error:  # what Ray makes of SIGTERM
        raise KeyboardInterrupt from error


def _gpu_share(scenario: Scenario) -> float:
    import torch

    if scenario.device.accelerator == "cpu" or not torch.cuda.is_available():
        return 0.0
    return gpu_share(torch.cuda.device_count(), scenario.simulation.workers)


def gpu_share(gpus: int, workers: int) -> float:
    """Of a GPU, for each worker. Ray places a share on one GPU and takes no broken number above 1."""
    return 1 / ceil(workers / gpus)
