"""`lightcl server keys`: fingerprints and expiry of a server's certificates and its boards' keys. Light at import."""

from __future__ import annotations

from typing import Annotated

import typer

from lightcl.errors import RequestError
from server.commands.options import Folder

SOON_DAYS = 60


def keys(
    folder: Folder = None,
    renew: Annotated[
        bool, typer.Option("--renew", help="Make a new server certificate; boards need nothing new")
    ] = False,
    address: Annotated[
        list[str] | None,
        typer.Option("--address", help="With --renew: another address to be in the certificate; repeatable"),
    ] = None,
) -> None:
    """Show certificates and keys: fingerprints, expiry, and what to do when one expires or is lost."""
    from datetime import UTC, datetime, timedelta

    from server.link import certificates
    from server.link.devices import Devices
    from server.link.folder import ServerFolder

    found = ServerFolder.open(folder)
    if address and not renew:
        raise RequestError("--address changes the certificate: add --renew")
    if found.settings.insecure:
        raise RequestError("this server is --insecure: it has no certificates and no keys (lightcl server init)")
    if renew:
        before = certificates.names_of(found.certificate.read_text())
        asked = [certificates.check_address(one) for one in address or []]
        found.renew(list(dict.fromkeys([found.settings.address, *before, *asked])))
        typer.echo("new server certificate; it is used when the server starts again")
    advice = {
        "authority": "a new folder (lightcl server init --overwrite); every board joins again",
        "server": "lightcl server keys --renew, then start the server again; boards need nothing new",
    }
    for name, file in (("authority", found.authority), ("server", found.certificate)):
        text = file.read_text()
        ends = certificates.expiry(text)
        left = ends - datetime.now(UTC)
        state = "EXPIRED" if left < timedelta(0) else "expires soon" if left.days < SOON_DAYS else "valid"
        typer.echo(f"{name} certificate: {state} until {ends:%Y-%m-%d} ({left.days} days); {file}")
        typer.echo(f"  SHA-256 {certificates.certificate_fingerprint(text)}")
        typer.echo(f"  when it expires: {advice[name]}")
    typer.echo(f"the server certificate is for {', '.join(certificates.names_of(found.certificate.read_text()))}")
    for one in Devices(found).all():
        if one.public_key:
            typer.echo(
                f"board {one.name} (device {one.device}): {certificates.key_fingerprint(one.public_key)}, no expiry"
            )
    typer.echo(
        "a board's key is lost or stolen: lightcl server add-device NAME --replace, and copy the new join file to it"
    )
