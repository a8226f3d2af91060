"""`lightcl plan`: the settings of LightCL that fit into a memory budget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from simulations.options import (
    Changes,
    Command,
    JsonTo,
    Plugins,
    ScenarioFile,
    command_app,
    console,
    read_scenario,
)

app = command_app()


@app.command(cls=Command)
def plan(
    scenario: ScenarioFile,
    budget: Annotated[float, typer.Option("--budget-mb", min=0, help="Memory for training, in MiB (2^20 bytes)")],
    changes: Changes = None,
    file: Annotated[
        Path | None, typer.Option("--out", metavar="FILE.yaml", help="Default: <name>-<budget>mb.yaml")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing files of --out and --json")] = False,
    print_all: Annotated[
        bool, typer.Option("--all", help="Print all settings, not only those around the chosen one")
    ] = False,
    json_to: JsonTo = None,
    plugins: Plugins = None,
) -> None:
    """Fit a LightCL scenario into a memory budget: freeze point, sparsity, batch and memory size."""
    from simulations.footprints import plan_run

    loaded = read_scenario(scenario, changes, plugins)
    plan_run(
        loaded, scenario, budget, file=file, overwrite=overwrite, print_all=print_all, json_to=json_to,
        console=console(stderr=json_to == "-"),
    )  # fmt: skip
