"""A simulated fleet: the server's rounds over devices in Flower's simulation runtime, into a run folder."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable
from pathlib import Path

from lightcl.errors import required
from lightcl.preparation import open_run
from lightcl.records import Run, load_run
from lightcl.records.folder import RunFolder
from lightcl.scenario import Scenario
from server.aggregation import Aggregator
from server.app import make_app
from server.listeners import Listener, Listeners
from server.rounds import Coordinator
from simulations.runtime import check_cluster, simulate


def run_fleet(
    scenario: Scenario,
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    listeners: Iterable[Listener] = (),
) -> Run:
    """Simulates the scenario's fleet as `lightcl simulate` does, writes the run folder `out` and reads it back.

    `resume` continues the run in `out`, `overwrite` replaces it; `listeners` are told what happens
    (server/listeners.py). Methods, networks and data sources of your own must be in a plugin file
    (`lightcl.load_plugins`), since workers are other processes. Raises RequestError before anything is written,
    RunFailure where the run cannot continue.
    """
    check_simulation(scenario)
    Aggregator.check(scenario.server)
    folder = RunFolder(Path(out).absolute())
    prepared = open_run(folder, scenario, shlex.join(sys.argv), "fleet", resume=resume, overwrite=overwrite)
    with folder.held():
        if not folder.whole:
            simulate_fleet(prepared.scenario, folder, Listeners(listeners))
    return load_run(folder.path)


def check_simulation(scenario: Scenario) -> None:
    """Raises MissingLibrary without the simulation runtime, RequestError for a cluster that cannot be reached."""
    required("ray", "simulation", "to simulate a fleet")
    check_cluster(scenario)


def simulate_fleet(scenario: Scenario, folder: RunFolder, listener: Listener) -> None:
    """Runs the rounds that the folder does not have yet; the folder is open and locked, the scenario is resolved.

    Raises RunFailure where the run cannot continue.
    """
    coordinator = Coordinator(scenario, folder, str(folder.read()["run"]), listener)
    try:
        simulate(make_app(coordinator), folder.path / "devices", scenario)
    finally:
        coordinator.stop.set()  # the server runs in a thread of this process and must end with it
