"""`lightcl footprint`: FLOPs and memory of training, counted and measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lightcl.errors import RequestError
from simulations.options import (
    Changes,
    Command,
    JsonTo,
    OptionalScenarioFile,
    Plugins,
    check_device,
    command_app,
    command_line,
    console,
    read_scenario,
)

app = command_app()


@app.command(cls=Command)
def footprint(
    scenario: OptionalScenarioFile = None,
    changes: Changes = None,
    table1: Annotated[bool, typer.Option("--table1", help="The paper's Table 1 (without a scenario)")] = False,
    methods: Annotated[
        str | None,
        typer.Option(help="Methods to compare, separated by commas; each but the scenario's uses its own defaults"),
    ] = None,
    all_methods: Annotated[bool, typer.Option("--all-methods", help="Compare all methods")] = False,
    device: Annotated[
        int | None,
        typer.Option(
            "--device",
            min=0,
            help="Device whose stream the FLOPs are counted on; default: the first of those that learn the most tasks",
        ),
    ] = None,
    measuring: Annotated[
        bool, typer.Option("--measure", help="Run real training steps in fresh processes and report the peak")
    ] = False,
    json_to: JsonTo = None,
    picture: Annotated[Path | None, typer.Option("--picture", metavar="FILE.png", help="Draw stacked bars")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace existing files of --json and --picture")
    ] = False,
    plugins: Plugins = None,
) -> None:
    """Count FLOPs and memory of training per method, and measure memory; 1 MiB is 2^20 bytes."""
    given = (scenario, changes, methods, device, picture, all_methods or None, measuring or None)
    if table1 and any(value is not None for value in given):
        raise RequestError("--table1 reproduces the paper's setting: it takes no scenario, only --json and --overwrite")
    if not table1 and scenario is None:
        raise RequestError("footprint: name a SCENARIO, or --table1 for the paper's setting")
    out = console(stderr=json_to == "-")
    from simulations.footprints import footprint_run, table1_run

    if scenario is None:
        table1_run(json_to=json_to, overwrite=overwrite, console=out)
        return
    loaded = read_scenario(scenario, changes, plugins)
    check_device(device or 0, loaded)
    footprint_run(
        loaded, scenario, methods=methods, all_methods=all_methods, device=device, measuring=measuring,
        json_to=json_to, picture=picture, overwrite=overwrite, command=command_line(), console=out,
    )  # fmt: skip
