"""The command `lightcl sweep`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lightcl.errors import RequestError
from simulations.options import Plugins, command_line, console, use_plugins


def sweep(
    scenario: Annotated[
        str | None, typer.Argument(metavar="SCENARIO", help="A scenario or sweep file, or the name of a bundled one")
    ] = None,
    grid: Annotated[
        list[str] | None,
        typer.Option("--grid", metavar="KEY=V1,V2,...", help="Values of a key (YAML); repeatable: all combinations"),
    ] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key in every run; repeatable")
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option("--preset", metavar="NAME|FILE", help="aggregation, table1, methods, demo, or a sweep file"),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            "--only",
            metavar="VARIANT",
            help="Run only this variant or value of an axis, or the one that begins so; repeatable",
        ),
    ] = None,
    seeds: Annotated[
        str | None, typer.Option("--seeds", metavar="N|LIST", help="How many seeds (5), or which ones (0,1,2)")
    ] = None,
    device: Annotated[
        list[int] | None,
        typer.Option("--device", min=0, help="Train this device alone, without Flower; repeatable. Default: the fleet"),
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Runs at a time")] = 1,
    out_folder: Annotated[
        Path | None, typer.Option("--out", help="Folder; default: runs/sweep-<preset>-<scenario's name>")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the sweep in --out; cells may be added")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the sweep in --out")] = False,
    only_table: Annotated[bool, typer.Option("--only-table", help="Run nothing; summarize the runs in --out")] = False,
    plugins: Plugins = None,
) -> None:
    """Run a scenario over a grid of keys and seeds, and summarize all runs in one table, picture and page."""
    use_plugins(plugins or [])  # the runs are processes that inherit them
    from lightcl.scenario import find_scenario, keys_without_effect
    from simulations.sweeps.description import (
        SweepDescription,
        find_preset,
        is_sweep_file,
        load_description,
        presets,
    )
    from simulations.sweeps.engine import run_sweep
    from simulations.sweeps.grid import make_sweep, parse_grid, parse_seeds

    if scenario == "-":
        raise RequestError("sweep: it reads its scenario more than once; give a file, not - (the standard input)")
    if scenario is not None and preset is None:
        bundled = presets().get(scenario)
        if bundled is not None and not Path(scenario).exists():
            scenario, preset = None, scenario
        elif is_sweep_file(found := find_scenario(Path(scenario))):
            scenario, preset = None, str(found)
    description = load_description(find_preset(preset)) if preset else SweepDescription()
    scenario = scenario or description.scenario
    if scenario is None:
        raise RequestError("sweep: name a SCENARIO, or a sweep file that has sweep.scenario")
    given = [parse_grid(text) for text in grid or []]
    twice = {key for key, _ in given if [k for k, _ in given].count(key) > 1}
    if twice:
        raise RequestError(f"--grid {min(twice)}: given twice; list all values after one --grid")
    update: dict[str, object] = {"grid": description.grid | dict(given)} if given else {}
    if seeds is not None:
        update["seeds"] = parse_seeds(seeds)
    if device:
        update["devices"] = list(dict.fromkeys(device))
    description = description.model_copy(update=update)
    names = [Path(preset).stem] if preset else []
    stem = "-".join(["sweep", *names, Path(scenario).stem])
    folder = (out_folder or Path("runs") / stem).absolute()
    plan = make_sweep(description, Path(scenario), changes or [], folder, only or [])
    for line in dict.fromkeys(line for cell in plan.cells for line in keys_without_effect(cell.scenario)):
        console(stderr=True).print(f"warning: {line}", style="yellow", highlight=False, markup=False, soft_wrap=True)
    run_sweep(
        plan, jobs=jobs, resume=resume, overwrite=overwrite, only_table=only_table,
        command=command_line(), console=console(),
    )  # fmt: skip
