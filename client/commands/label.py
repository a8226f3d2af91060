"""`lightcl device label`: a local web page to label a board's images. Light at import."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from client.commands.shared import ConfigFile, load
from lightcl.errors import RequestError

if TYPE_CHECKING:
    from client.labeling import Labeling


def label(
    folder: Annotated[
        Path | None,
        typer.Argument(metavar="[FOLDER]", help="The folder of the images; default: `data` of the configuration"),
    ] = None,
    config: ConfigFile = None,
    classes: Annotated[
        list[str] | None,
        typer.Option("--class", metavar="NAME", help="A class; repeatable. Default: those of the run, or the folders"),
    ] = None,
    host: Annotated[str, typer.Option("--host", help="An address of this machine, to label from another one")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: any free one, which is printed")] = 8091,
) -> None:
    """Label images in a browser, one key per class: moves each from `unlabeled` to the folder of its class.

    The page is on this machine alone, unless --host says otherwise; the address that is printed then has a secret part.
    """
    from client.labeling import LabelServer

    with LabelServer(labeling_of(folder, config, classes or []), host, port) as server:
        sys.stdout.write(f"label the images of {server.labeling.folder} at {server.url}\n")
        sys.stdout.flush()
        server.serve_forever()


def labeling_of(folder: Path | None, config: Path | None, classes: list[str]) -> Labeling:
    """The images of `folder`, or of a board's configuration and its newest run. Raises RequestError."""
    from client.board.field import newest_field
    from client.labeling import Labeling

    if folder is not None:
        if config is not None:
            raise RequestError("FOLDER and --config are given; name one of them")
        return Labeling.of(folder, classes)
    board = load(config)
    tasks = newest_field(board.state_folder)
    place = board.data or (tasks.plan.path if tasks else "")
    if not place:
        raise RequestError(
            "the board's configuration has no `data`; name the folder of its images: lightcl device label FOLDER"
        )
    same = tasks if tasks and Path(tasks.plan.path) == Path(place) else None
    return Labeling.of(Path(place), classes or (list(same.plan.classes) if same else []), same)
