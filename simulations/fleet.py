"""A simulated fleet: the server's rounds over simulated devices, into a run folder."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

from lightcl.errors import required
from lightcl.preparation import Prepared, open_run
from lightcl.records import Run, load_run
from lightcl.records.folder import RunFolder
from lightcl.scenario import Scenario
from server.aggregation import Aggregator
from server.app import make_app
from server.ledger import KnownImages
from server.listeners import Listener, Listeners
from server.rounds import Coordinator
from simulations.runtime import check_cluster, simulate
from simulations.runtime.disk import DiskNeed, check_disk, disk_need


def run_fleet(
    scenario: Scenario,
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    listeners: Iterable[Listener] = (),
) -> Run:
    """Simulates the scenario's fleet as `lightcl simulate` does, writes the run folder `out` and reads it back.

    `resume` continues the run in `out`, `overwrite` replaces it; `listeners` are called when something happens
    (server/listeners.py). Methods, networks and data sources of your own must be in a plugin file
    (`lightcl.load_plugins`), since workers are other processes. Raises RequestError before anything is written,
    RunFailure where the run cannot continue.
    """
    check_simulation(scenario)
    Aggregator.check(scenario)
    folder = RunFolder(Path(out).absolute())
    prepared = open_run(folder, scenario, shlex.join(sys.argv), "fleet", resume=resume, overwrite=overwrite)
    with folder.locked():
        if not folder.completed:
            simulate_fleet(prepared, folder, Listeners(listeners))
    return load_run(folder.path)


def check_simulation(scenario: Scenario) -> None:
    """Raises MissingLibrary without the simulation runtime, RequestError for a cluster that cannot be reached."""
    required("ray", "simulation", "to simulate a fleet")
    check_cluster(scenario)


def disk_of_states(prepared: Prepared) -> DiskNeed:
    """The maximum disk space of the fleet's states while the run is in progress."""
    source = prepared.source
    return disk_need(
        prepared.scenario,
        image=source.train.images.shape[1:],
        classes=len(prepared.counts.head),
        images=prepared.counts.train_used,
        tasks=[len(tasks) for tasks in prepared.tasks],
    )


def simulate_fleet(prepared: Prepared, folder: RunFolder, listener: Listener) -> None:
    """Runs the rounds that the folder does not have yet; the folder is open and locked, the scenario is resolved.

    With `keep_states: none`, the states are deleted when the run is complete: one with dropped devices can be resumed.

    Raises RequestError where the disk has too little room for the states, RunFailure where the run cannot continue.
    """
    check_disk(disk_of_states(prepared), folder.path / "devices")
    run_id = str(folder.read()["run"])
    images = KnownImages.of(prepared)
    coordinator = Coordinator(
        prepared.scenario, folder, run_id, listener, prepared.tasks, images=images, durable=False
    )  # fmt: skip
    states = folder.path / "devices"
    try:
        simulate(make_app(coordinator), states, prepared.scenario)
    except KeyboardInterrupt:
        coordinator.stop.set()
        folder.interrupt(coordinator.ledger.dropped)  # also where workers that Ctrl-C ended were taken for dead ones
        raise
    finally:
        coordinator.stop.set()  # the server runs in a thread of this process and must end with it
    if prepared.scenario.simulation.keep_states == "none" and folder.completed:
        shutil.rmtree(states, ignore_errors=True)
