"""`lightcl analyze`: how general each block is on one device's stream, and the freeze point that follows."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from lightcl.errors import RequestError, required
from simulations.options import (
    Changes,
    Command,
    Plugins,
    ScenarioFile,
    check_device,
    command_app,
    command_line,
    console,
    read_scenario,
)

ANALYSIS_PICTURE = "generalizability.png"

app = command_app()


@app.command(cls=Command)
def analyze(
    scenario: ScenarioFile, changes: Changes = None,
    device: Annotated[int, typer.Option("--device", min=0, help="Device whose stream is analyzed")] = 0,
    threshold: Annotated[
        float | None,
        typer.Option(
            "--threshold", min=0, max=1, help="Generalizability above which a block is frozen; sets "
            "network.freeze_threshold",
        ),
    ] = None,
    out_folder: Annotated[
        Path | None, typer.Option("--out", help="Folder; default: runs/<scenario's name>-<seed>-analysis-<device>")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the analysis in --out")] = False,
    plugins: Plugins = None,
) -> None:  # fmt: skip
    """Measure how general each block is on one device's stream, and choose a freeze point."""
    from lightcl.analysis.generalizability import analyze, analyzed_scenario
    from lightcl.preparation import prepare
    from lightcl.records.folder import ANALYSIS
    from lightcl.storage.files import names_in, writable, write_atomically
    from simulations.commands.shared import default_folder
    from simulations.progress import AnalysisProgress, print_blocks

    given = [] if threshold is None else [f"network.freeze_threshold={threshold}"]
    loaded, out = read_scenario(scenario, [*(changes or []), *given], plugins, analyzed=True), console()
    check_device(device, loaded)
    required("matplotlib", "simulation", "for the picture of an analysis")
    path = out_folder or default_folder(loaded, f"-analysis-{device}")
    file, picture = path / ANALYSIS, path / ANALYSIS_PICTURE
    if names_in(path, (ANALYSIS, ANALYSIS_PICTURE)) and not overwrite:
        raise RequestError(f"--out: {path} holds an analysis; replace it with --overwrite")
    analyzed_scenario(loaded)
    prepared = prepare(loaded)
    with writable(path):
        path.mkdir(parents=True, exist_ok=True)
    with AnalysisProgress(out) as progress:
        found = analyze(loaded, device, prepared.source, prepared.shares[device], progress.step)
    from simulations.reports import plots

    limit = loaded.network.freeze_threshold
    about = {"command": command_line(), "scenario": loaded.model_dump(mode="json")}
    write_atomically(file, json.dumps(found.record(limit) | about, indent=2))
    picture.write_bytes(plots.png(plots.generalizability(found, limit, plots.LIGHT)))
    print_blocks(out, found, limit)
    out.print(
        f"freeze point at threshold {limit:g}: {found.freeze_point(limit)}\n"
        f"figures: {os.path.relpath(file)}; picture: {os.path.relpath(picture)}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
