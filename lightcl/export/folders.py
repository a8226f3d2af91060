"""Where a model is: in a run folder, in a device's state folder, or below a board's `state-dir`."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from lightcl.assembly import fleet_head
from lightcl.data.sources import load_source
from lightcl.errors import RequestError
from lightcl.export.model import DESCRIPTION, Description
from lightcl.records.folder import RunFolder
from lightcl.records.old_runs import is_old
from lightcl.records.reading import recorded_scenario
from lightcl.storage.state import MANIFEST


class Place(NamedTuple):
    """A description and the state folder that it belongs to."""

    about: Description
    folder: Path


def find_model(folder: Path, device: int | None = None) -> Place:
    """The model of `device` in a folder; None: the only or newest one of a board, device 0 of a fleet's run.

    `folder` is a run folder, or a board's state folder, or the `state-dir` above it. Raises RequestError.
    """
    if (folder / "run.json").exists():
        return _in_run(RunFolder(folder), device)
    found = [folder] if (folder / DESCRIPTION).exists() else _below(folder, DESCRIPTION)
    if device is not None:
        found = [state for state in found if Description.read(state).device == device]
    if not found:
        whose = "" if device is None else f" of device {device}"
        raise RequestError(
            f"{folder}: no model{whose} is here; name a run folder, or the state folder of a board that has taken part "
            "in a run (state-dir in its node configuration)"
        )
    newest = max(found, key=_saved_at)
    return Place(Description.read(newest), newest)


def _in_run(run: RunFolder, device: int | None) -> Place:
    about = run.read()
    if is_old(about["scenario"]):
        raise RequestError(f"{run.path}: the run was made by an earlier version; its states cannot be read")
    scenario = recorded_scenario(run, about["scenario"])
    kind = str(about.get("kind", "fleet"))
    only = int(kind.removeprefix("device ")) if kind.startswith("device ") else None
    number = (only or 0) if device is None else device
    if number >= scenario.fleet.devices or number != (number if only is None else only):
        allowed = f"0 to {scenario.fleet.devices - 1}" if only is None else f"{only}, which this run trained alone"
        raise RequestError(f"--device {number}: the run {run.path} has no such device (allowed: {allowed})")
    states = [state for state in _below(run.path / "devices", MANIFEST) if state.name == f"device-{number:05d}"]
    if not states:
        raise RequestError(
            f"{run.path} keeps no state of device {number}: {_why(run, number, scenario.simulation.keep_states)}"
        )
    source = load_source(scenario.source_request())
    head = fleet_head(scenario, source)
    return Place(Description.of(scenario, number, source, head), max(states, key=_saved_at))


def _why(run: RunFolder, number: int, keep_states: str) -> str:
    """Why a run folder has no state of a device, and what to do."""
    if keep_states == "none":
        return "the scenario has simulation.keep_states: none; run it again with `all`"
    if not (run.path / "devices").exists():
        return "the devices of this run keep their states themselves; use `lightcl export` on the board"
    if run.partition().get(number, {}).get("tasks") == []:
        return "the device learns no task; name another --device"
    return "the device has not trained yet; name another --device, or wait"


def _below(folder: Path, name: str) -> list[Path]:
    """Folders `device-NNNNN` that hold the file, directly below `folder` or below a run's name."""
    files = [*folder.glob(f"device-*/{name}"), *folder.glob(f"*/device-*/{name}")]
    return sorted(file.parent for file in files)


def _saved_at(state: Path) -> float:
    """When a state was saved; 0 where it never was."""
    try:
        return (state / MANIFEST).stat().st_mtime
    except OSError:
        return 0.0
