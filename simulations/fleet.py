"""A simulated fleet: the server's rounds over devices in Flower's simulation runtime, into an open run folder."""

from __future__ import annotations

import logging

import numpy as np

from lightcl.assembly import tasks_of_fleet
from lightcl.data.partition import partition
from lightcl.data.sources import load_source
from lightcl.errors import required
from lightcl.records.folder import RunFolder
from lightcl.scenario import Scenario
from server.app import make_app
from server.listeners import Listener
from server.rounds import Coordinator
from simulations.runtime import check_cluster, simulate
from simulations.runtime.disk import check_disk, disk_need

logger = logging.getLogger(__name__)


def check_simulation(scenario: Scenario) -> None:
    """Raises MissingLibrary without the simulation runtime, RequestError for a cluster that cannot be reached."""
    required("ray", "simulation", "to simulate a fleet")
    check_cluster(scenario)


def simulate_fleet(scenario: Scenario, folder: RunFolder, listener: Listener) -> None:
    """Runs the rounds that the folder does not have yet; the folder is open and locked, the scenario is resolved.

    Raises RunFailure where the run cannot continue, RequestError where the disk has no room for the devices' states.
    """
    source = load_source(scenario.source_request())
    tasks = tasks_of_fleet(scenario, source, partition(source, scenario.fleet, scenario.seed))
    need = disk_need(
        scenario, channels=source.channels, classes=len(source.classes),
        image_bytes=int(np.prod(source.train.images.shape[1:])),
    )  # fmt: skip
    check_disk(need, folder.path / "devices")
    logger.info("%s", need)
    run_id = str(folder.read()["run"])
    coordinator = Coordinator(scenario, folder, run_id, listener, tasks, durable=False)
    try:
        simulate(make_app(coordinator), folder.path / "devices", scenario)
    finally:
        coordinator.stop.set()  # the server runs in a thread of this process and must end with it
