"""`lightcl sweep`: checks all cells, runs those that are not complete, and writes one summary.

Nothing is written before every cell is checked. --resume continues a killed sweep; cells may be added or left out, but
a cell keeps its scenario.
"""

from __future__ import annotations

import json
import shutil
from typing import Any

from rich.console import Console

from lightcl.analysis.footprint.comparison import footprint_of
from lightcl.analysis.footprint.measured import MeasurementFailure
from lightcl.data.sources import load_source
from lightcl.errors import RequestError
from lightcl.preparation import prepare
from lightcl.records.folder import RunFolder
from lightcl.records.provenance import describe_run
from lightcl.scenario import scenario_from_json
from lightcl.scenario.digest import scenario_digest
from lightcl.storage.files import LOCK, names_in, writable, write_atomically
from server.aggregation import Aggregator
from server.rounds import RunFailure
from simulations.sweeps.grid import Cell, Sweep
from simulations.sweeps.processes import run_cells
from simulations.sweeps.summary import OUTPUTS, write_summary

RECORD, FOOTPRINT = "sweep.json", "footprint.json"
OWN = (RECORD, FOOTPRINT, *OUTPUTS, "scenarios", "logs", "runs", LOCK)


def run_sweep(
    sweep: Sweep, *, jobs: int, resume: bool, overwrite: bool, only_table: bool, command: str, console: Console
) -> None:
    """Runs the cells that are not complete, then writes the summary.

    Raises RequestError before anything is written, RunFailure where a run failed.
    """
    _check_folder(sweep, resume=resume or only_table, overwrite=overwrite)
    if only_table:
        write_summary(sweep, _record(sweep), _footprints(sweep), console)
        return
    _check_cells(sweep)
    for line in [*sweep.resets, *(f"left out: {line}" for line in sweep.skipped)]:
        console.print(line, style="yellow", highlight=False, markup=False)
    with writable(sweep.folder):
        sweep.folder.mkdir(parents=True, exist_ok=True)
    with RunFolder(sweep.folder).locked():
        _begin(sweep, command, overwrite=overwrite)
        # Memory first: it is quick, and the summary of an unfinished sweep then includes it.
        failures = _measure_memory(sweep, console) if sweep.description.footprint else {}
        failures |= run_cells(sweep, jobs, console)
        write_summary(sweep, _record(sweep), _footprints(sweep), console)
    if failures:
        reasons = "\n".join(f"{cell}: {reason}" for cell, reason in failures.items())
        raise RunFailure(
            f"{len(failures)} of {len(sweep.cells)} runs or measurements failed; continue with --resume\n{reasons}"
        )


def _check_cells(sweep: Sweep) -> None:
    """Raises RequestError that names the cell, for anything that its run would refuse."""
    for cell in sweep.cells:
        try:
            _check_cell(cell)
        except RequestError as error:
            raise RequestError(f"cell {cell.title!r}: {error}") from error


def _check_cell(cell: Cell) -> None:
    scenario = cell.scenario
    if scenario.network.freeze == "auto":
        raise RequestError(
            "network.freeze is 'auto', which may choose another block for every seed: set network.freeze to the block "
            "that `lightcl analyze` names"
        )
    if cell.device is not None:
        if cell.device >= scenario.fleet.devices:
            raise RequestError(f"fleet.devices is {scenario.fleet.devices}: there is no device {cell.device}")
        if scenario.method.sums_statistics:
            raise RequestError("method.share_statistics needs a fleet: leave out --device, or set it to false")
    Aggregator.check(scenario)
    prepare(scenario)


# -- the folder ----------------------------------------------------------------------------------------------------


def _check_folder(sweep: Sweep, *, resume: bool, overwrite: bool) -> None:
    """Raises RequestError where the folder holds something that this sweep must not continue or replace."""
    folder, file = sweep.folder, sweep.folder / RECORD
    if resume and overwrite:
        raise RequestError("--resume and --overwrite: choose one")
    names_in(folder, OWN, file)
    if resume and not file.exists():
        raise RequestError(f"--out: {folder} holds no sweep to continue")
    if file.exists() and not resume and not overwrite:
        raise RequestError(f"--out: {folder} holds a sweep; continue it with --resume or replace it with --overwrite")
    if resume:
        _record(sweep)
        for cell in sweep.cells:
            _check_same(sweep, cell)


def _check_same(sweep: Sweep, cell: Cell) -> None:
    """Raises RequestError where the cell's run folder holds the run of another scenario."""
    file = sweep.folder / "scenarios" / f"{cell.name}.json"
    if not file.exists():
        return
    try:
        earlier = scenario_from_json(file.read_text(encoding="utf-8"), str(file))
    except (OSError, ValueError) as error:
        raise RequestError(f"{file} cannot be read ({error}); replace the sweep with --overwrite") from error
    if scenario_digest(earlier) != scenario_digest(cell.scenario):
        raise RequestError(
            f"--resume: {sweep.folder} holds the run of another scenario for cell {cell.title!r}; name another --out"
        )


def _record(sweep: Sweep) -> dict[str, Any]:
    file = sweep.folder / RECORD
    try:
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        readable = isinstance(record["starts"], list) and isinstance(record["points"], list)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RequestError(f"{file} cannot be read ({error}); replace it with --overwrite") from error
    if not readable:
        raise RequestError(f"{file}: not the record of a sweep; replace it with --overwrite")
    return record


def _begin(sweep: Sweep, command: str, *, overwrite: bool) -> None:
    file = sweep.folder / RECORD
    if overwrite:
        file.unlink(missing_ok=True)  # first: a folder without it is no sweep, even if removal is interrupted
    if not file.exists():  # also removes what is left of a sweep that was killed while it was replaced
        for name in set(OWN) - {LOCK}:
            shutil.rmtree(sweep.folder / name, ignore_errors=True)
            (sweep.folder / name).unlink(missing_ok=True)
    for name in ("scenarios", "logs", "runs"):
        (sweep.folder / name).mkdir(parents=True, exist_ok=True)
    for cell in sweep.cells:
        write_atomically(sweep.folder / "scenarios" / f"{cell.name}.yaml", cell.scenario.to_yaml())
        write_atomically(sweep.folder / "scenarios" / f"{cell.name}.json", cell.scenario.model_dump_json())
    record = _record(sweep) if file.exists() else {"starts": []}
    record["starts"].append(describe_run(command, "sweep"))
    record["sweep"] = sweep.description.model_dump(mode="json")
    record["points"] = [
        {
            "label": point.label,
            "baseline": sweep.baseline_of(point).label,
            "runs": [f"runs/{cell.name}" for cell in sweep.of(point)],
        }
        for point in sweep.points
    ]
    write_atomically(file, json.dumps(record, indent=2))


# -- memory --------------------------------------------------------------------------------------------------------


def _footprints(sweep: Sweep) -> dict[str, Any]:
    """By a point's label: its counted and measured footprint, where there is one."""
    file = sweep.folder / FOOTPRINT
    return dict(json.loads(file.read_text())) if file.exists() else {}


def _measure_memory(sweep: Sweep, console: Console) -> dict[str, str]:
    """Counts and measures the points that have no footprint yet; returns the reasons for failures."""
    known = _footprints(sweep)
    failures: dict[str, str] = {}
    for point in sweep.points:
        if point.label in known:
            continue
        cell = sweep.of(point)[0]
        console.print(f"measuring the memory of {point.label} in a fresh process", style="dim", highlight=False)
        source = load_source(cell.scenario.source_request())
        try:
            found = footprint_of(cell.scenario, source, cell.device, measuring=True, process=False)
            known[point.label] = found.to_json()
        except MeasurementFailure as error:
            failures[f"memory of {point.label}"] = str(error)
        else:
            write_atomically(sweep.folder / FOOTPRINT, json.dumps(known, indent=2))
    return failures
