"""`lightcl bench table1`: the methods of the paper's Table 1 on one scenario."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from simulations.options import Changes, Command, Plugins, ScenarioFile, command_app, command_line, console
from simulations.options import read_scenario as read

app = command_app()


@app.callback()
def _bench() -> None:
    """Benchmarks of methods on a scenario."""


@app.command("table1", cls=Command)
def table1(
    scenario: ScenarioFile, changes: Changes = None,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds, counted from the scenario's seed")] = 5,
    methods: Annotated[str | None, typer.Option(help="Methods, separated by commas; default: all")] = None,
    device: Annotated[
        int | None, typer.Option("--device", min=0, help="Train one device alone; default: the whole fleet")
    ] = None,
    out_folder: Annotated[Path | None, typer.Option("--out", help="Default: runs/table1-<scenario's name>")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Number of runs at a time")] = 1,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the benchmark in --out")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the benchmark in --out")] = False,
    only_table: Annotated[bool, typer.Option("--only-table", help="Print the table of the finished runs only")] = False,
    plugins: Plugins = None,
) -> None:  # fmt: skip
    """Run the methods of the paper's Table 1 on one stream: accuracy, forgetting, FLOPs and memory, side by side.

    Each method uses its own defaults. The scenario's method section applies to its own method only, network.freeze and
    network.frozen_batch_norm to the methods with the same default freeze point, server.aggregation to the methods whose
    weights can be averaged. The table lists the keys that were reset.
    """
    loaded = read(scenario, changes, plugins)
    from simulations.sweeps.table1 import bench_run

    path = out_folder or Path("runs") / f"table1-{loaded.name}"
    bench_run(
        loaded, seeds=seeds, methods=methods, device=device, out_folder=path, jobs=jobs, resume=resume,
        overwrite=overwrite, only_table=only_table, command=command_line(), console=console(),
    )  # fmt: skip
