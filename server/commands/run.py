"""`lightcl server run`: the server of a fleet of boards, until it is stopped. Light at import."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from server.commands.options import Changes, Folder, Out


def run(
    scenario: Annotated[Path | None, typer.Argument(metavar="[SCENARIO]")] = None,
    changes: Changes = None,
    out: Out = None,
    folder: Folder = None,
    until_done: Annotated[
        bool, typer.Option("--until-done", help="End when no run is left; exit code 1 if one was given up")
    ] = False,
) -> None:
    """Run the server: lets boards in, and works on the runs that were asked for, one after the other.

    Stop it with Ctrl-C. After that, or after a crash, the same command continues unfinished runs after their last
    finished round. With SCENARIO (a YAML file, or the name of a bundled scenario) it also asks for that run; so does
    `lightcl server start` in another terminal. A run that fails is started again after 10 s and 60 s, and
    given up after 3 failures without a finished round between them.
    """
    from datetime import datetime

    from lightcl.errors import Failure, RequestError
    from server.link.folder import ServerFolder
    from server.link.runs import Runs, ask_apart
    from server.link.supervisor import Supervisor, check_before_start, only_server

    def say(text: str) -> None:
        typer.echo(f"{datetime.now():%H:%M:%S} {text}")

    if scenario is None and (changes or out):
        raise RequestError("--set and --out belong to a run: name its SCENARIO, too")
    found = ServerFolder.open(folder)
    with only_server(found):
        check_before_start(found)
        if scenario is not None:
            say(ask_apart(found, scenario, changes or [], out))
        runs = Runs(found)
        asked = {one.number for one in runs.all() if one.open}
        Supervisor(found, say).run(lambda: until_done and not any(one.open for one in runs.all()))
    failed = [one for one in runs.all() if one.state == "failed" and one.number in asked]
    if failed:
        raise Failure(f"run {failed[-1].number} was given up: {failed[-1].reason}")
