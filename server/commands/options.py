"""Options that several commands for the server share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Folder = Annotated[
    Path | None,
    typer.Option("--folder", help="The server's folder; default: $LIGHTCL_SERVER, else ~/.config/lightcl/server"),
]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a key, e.g. fleet.devices=3; repeatable"),
]
Out = Annotated[Path | None, typer.Option("--out", help="Run folder; default: runs/<scenario's name>-<seed>")]
