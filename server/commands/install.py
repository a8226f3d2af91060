"""`lightcl server install`: a systemd unit that starts the server with the machine. Light at import."""

from __future__ import annotations

from typing import Annotated

import typer

from server.commands.options import Folder


def install(
    folder: Folder = None,
    user: Annotated[
        bool, typer.Option("--user", help="A unit of this user instead of the system's; needs no root")
    ] = False,
    show: Annotated[bool, typer.Option("--print", help="Print the unit and write nothing")] = False,
) -> None:
    """Write a systemd unit that starts the server with the machine and restarts it when it ends."""
    from server.link.folder import ServerFolder
    from server.link.service import NAME, unit, write_unit

    found = ServerFolder.open(folder)
    text = unit(found, user=user)
    if show:
        typer.echo(text, nl=False)
        return
    file = write_unit(text, user=user)
    flag = " --user" if user else ""
    typer.echo(f"wrote {file}")
    typer.echo(f"next: systemctl{flag} daemon-reload && systemctl{flag} enable --now {NAME}")
    typer.echo(f"its log: journalctl{flag} -u {NAME} -f")
    if user:
        typer.echo("to keep it running when you are logged out: loginctl enable-linger")
