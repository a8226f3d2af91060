"""Steps that `simulate` and `train` share: open the run folder, and print results and report at the end."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from lightcl.errors import MissingLibrary, required
from simulations.options import amount

if TYPE_CHECKING:
    from rich.console import Console

    from lightcl.preparation import Prepared
    from lightcl.records.folder import RunFolder
    from lightcl.scenario import Scenario


def default_folder(scenario: Scenario, suffix: str = "") -> Path:
    """Where a run is written when --out is not given."""
    return Path("runs") / f"{scenario.name}-{scenario.seed}{suffix}"


def open_folder(
    folder: RunFolder, scenario: Scenario, kind: str, command: str, *, resume: bool, overwrite: bool, console: Console
) -> Prepared:
    """Checks the request as a whole, then begins or resumes the run; `kind` is "fleet" or "device N".

    Raises RequestError before anything is written.
    """
    from lightcl.device.arithmetic import KEYS, slow_arithmetic
    from lightcl.preparation import open_run
    from server.aggregation import Aggregator
    from simulations.progress import AnalysisProgress

    Aggregator.check(scenario)
    with AnalysisProgress(console) as progress:
        prepared = open_run(folder, scenario, command, kind, resume=resume, overwrite=overwrite, on_step=progress.step)
    if scenario.network.freeze == "auto":
        console.print(f"network.freeze: auto chose {prepared.scenario.network.freeze}", highlight=False)
    for key in KEYS:
        if getattr(scenario.device, key) == "auto":
            console.print(f"device.{key}: auto chose {getattr(prepared.scenario.device, key)}", highlight=False)
    for warning in slow_arithmetic(prepared.scenario, scenario.device):
        console.print(f"warning: {warning}", style="yellow", highlight=False, markup=False, soft_wrap=True)
    return prepared


def print_results(folder: RunFolder, console: Console, *, report: bool) -> None:
    """The final figures of a run, and its report unless --no-report was given."""
    from simulations.progress import print_accuracies

    results = folder.results()
    if results:
        print_accuracies(console, results)
        if results.dropped:
            lost = amount(len(results.dropped), "device")
            console.print(f"[yellow]dropped from the run: {lost}[/]", highlight=False)
    if report:
        print_report(folder, console)


def print_report(folder: RunFolder, console: Console) -> None:
    """Builds the report and prints its path. Without the plotting libraries the run is complete all the same."""
    try:
        page = os.path.relpath(build_report(folder))
    except MissingLibrary as error:
        console.print(f"report: not written, {error}", highlight=False, markup=False, soft_wrap=True)
    else:
        console.print(f"report: {page}", highlight=False, markup=False, soft_wrap=True)


def build_report(folder: RunFolder) -> Path:
    """Writes the report of a run, finished or not. Raises MissingLibrary where the extra `simulation` is missing."""
    for library in ("jinja2", "matplotlib"):
        required(library, "simulation", "for the report")
    from simulations.reports.page import build_report as build

    return build(folder)
