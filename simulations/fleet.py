"""A simulated fleet: the server's rounds over devices in Flower's simulation runtime, into an open run folder."""

from __future__ import annotations

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


def check_simulation(scenario: Scenario) -> None:
    """Raises MissingLibrary without the simulation runtime, RequestError for a cluster that cannot be reached."""
    required("ray", "simulation", "to simulate a fleet")
    check_cluster(scenario)


def simulate_fleet(scenario: Scenario, folder: RunFolder, listener: Listener) -> None:
    """Runs the rounds that the folder does not have yet; the folder is open and locked, the scenario is resolved.

    Raises RunFailure where the run cannot continue.
    """
    source = load_source(scenario.source_request())
    tasks = tasks_of_fleet(scenario, source, partition(source, scenario.fleet, scenario.seed))
    run_id = str(folder.read()["run"])
    coordinator = Coordinator(scenario, folder, run_id, listener, tasks, durable=False)
    try:
        simulate(make_app(coordinator), folder.path / "devices", scenario)
    finally:
        coordinator.stop.set()  # the server runs in a thread of this process and must end with it
