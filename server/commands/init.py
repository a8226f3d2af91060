"""`lightcl server init`: a folder with certificates, from which a server can start. Light at import."""

from __future__ import annotations

from typing import Annotated

import typer

from server.commands.options import Folder


def init(
    folder: Folder = None,
    address: Annotated[
        list[str] | None,
        typer.Option(
            "--address",
            help="Host name or IP address under which boards reach this server; repeatable: the first is given to "
            "boards. Default: this machine's addresses and name",
        ),
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port that boards connect to")] = 9092,
    devices: Annotated[
        int, typer.Option(min=0, help="How many boards the fleet has; makes a join file for each of them")
    ] = 0,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="No TLS and no keys: anyone who can reach the port can join")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing server: every board must join again")
    ] = False,
) -> None:
    """Make the folder of a server: an authority, a certificate, and join files for boards."""
    from server.link.certificates import check_address, expiry, own_addresses
    from server.link.devices import Devices
    from server.link.folder import ServerFolder, Settings

    addresses = [check_address(one) for one in address or []] or own_addresses()
    listen = "::" if ":" in addresses[0] else "0.0.0.0"
    settings = Settings(addresses[0], port, listen, devices=devices, insecure=insecure)
    made = ServerFolder.create(folder, settings, addresses, overwrite=overwrite)
    typer.echo(f"server folder: {made.path}")
    typer.echo(f"boards connect to {settings.server}")
    if insecure:
        typer.echo("warning: --insecure: nothing is encrypted, and anyone who can reach the port can join", err=True)
    else:
        typer.echo(
            f"certificate for {', '.join(dict.fromkeys([*addresses, 'localhost', '127.0.0.1']))}, valid until "
            f"{expiry(made.certificate.read_text()):%Y-%m-%d}; authority until "
            f"{expiry(made.authority.read_text()):%Y-%m-%d}"
        )
    for number in range(devices):
        typer.echo(f"join file: {Devices(made).add(f'board-{number}')}")
    if devices:
        typer.echo(
            "next: copy each join file to its board and run there `lightcl device init --join FILE`; here run "
            f"`lightcl server run SCENARIO --set fleet.devices={devices}`"
        )
    else:
        typer.echo("next: lightcl server add-device NAME --devices N")
