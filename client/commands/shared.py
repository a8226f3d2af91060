"""What the commands for boards share. Light at import."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from client.board.config import BoardConfig

ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config", metavar="FILE", help="The board's configuration; default $LIGHTCL_DEVICE, else "
        "~/.config/lightcl/device.toml"
    ),
]  # fmt: skip


def file_of(config: Path | None) -> Path:
    """The configuration's file as an absolute path."""
    from client.board.config import default_file

    return (config.expanduser() if config else default_file()).absolute()


def load(config: Path | None) -> BoardConfig:
    """Raises RequestError."""
    from client.board.config import read_config

    return read_config(file_of(config))


def state_folder(given: Path | None) -> Path:
    """Where states are: `given`, else what the configuration says, else the default. Raises RequestError."""
    from client.board.config import default_file, default_state_folder

    if given is not None:
        return given
    return load(None).state_folder if default_file().exists() else default_state_folder()


def duration(seconds: float) -> str:
    """`42 s`, `5 min`, `3 h`, `2 d`: the largest unit that fits."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
