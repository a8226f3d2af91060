"""`lightcl server add-device`: lets one more board into the fleet. Light at import."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from lightcl.errors import RequestError
from server.commands.options import Folder


def add_device(
    name: Annotated[str, typer.Argument(metavar="NAME")],
    folder: Folder = None,
    device: Annotated[
        int | None, typer.Option(min=0, help="Which device of the fleet it is, from 0; default: the next free one")
    ] = None,
    devices: Annotated[
        int | None, typer.Option(min=1, help="How many boards the fleet has; remembered in server.toml")
    ] = None,
    public_key: Annotated[
        Path | None,
        typer.Option("--public-key", metavar="FILE", help="The public key of a board that made its own key"),
    ] = None,
    replace_key: Annotated[
        bool, typer.Option("--replace", help="Give a new key to a board that exists; its old key is refused from now")
    ] = False,
) -> None:
    """Add a board: makes its key and its join file, which is copied to the board. A running server takes it at once."""
    from server.link.devices import Devices
    from server.link.folder import ServerFolder

    found = ServerFolder.open(folder)
    key = _read(public_key) if public_key else None
    if key and found.settings.insecure:
        raise RequestError("--public-key: this server is --insecure and has no keys; leave the option out")
    if devices:
        least = 1 + max((one.device for one in Devices(found).all()), default=-1)
        if devices < least:
            raise RequestError(f"--devices is {devices}, but the server has device {least - 1} (allowed: from {least})")
        before = found.settings.devices
        found = ServerFolder(found.path, replace(found.settings, devices=devices))
    elif not found.settings.devices:
        raise RequestError(
            "how many boards will the fleet have? Give --devices N with the first board (each board is told the number)"
        )
    file = Devices(found).add(name, public_key=key, number=device, replaces=replace_key)
    if devices:
        found.save()
        if before not in (0, devices):
            typer.echo(
                f"warning: the fleet has {devices} boards now; set devices = {devices} on those that joined before",
                err=True,
            )
    typer.echo(f"join file: {file}")
    typer.echo(f"next: copy it to the board and run there: lightcl device init --join {name}.toml")


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"--public-key: {file} cannot be read ({error})") from error
