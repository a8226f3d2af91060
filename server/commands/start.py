"""`lightcl server start`: asks a server for a run. Light at import."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from server.commands.options import Changes, Folder, Out


def start(
    scenario: Annotated[Path, typer.Argument(metavar="SCENARIO")],
    changes: Changes = None,
    out: Out = None,
    folder: Folder = None,
) -> None:
    """Ask the server for a run; it starts when the runs before it are over. A run that was given up is tried again.

    SCENARIO is a YAML file, or the name of a bundled scenario.
    """
    from server.link.folder import ServerFolder
    from server.link.runs import Runs, prepare

    found = ServerFolder.open(folder)
    loaded, place = prepare(scenario, changes or [], out, found.settings.devices)
    _, text = Runs(found).ask(str(scenario), changes or [], loaded, place)
    typer.echo(text)
    if found.running() is None:
        typer.echo("no server runs on this folder; the run starts with `lightcl server run`")
