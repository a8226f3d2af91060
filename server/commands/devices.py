"""`lightcl server devices`: the boards of a fleet. Light at import."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from server.commands.options import Folder

if TYPE_CHECKING:
    from server.link.devices import Device
    from server.link.flower import Node


def devices(
    folder: Folder = None, as_json: Annotated[bool, typer.Option("--json", help="Print the boards as JSON")] = False
) -> None:
    """List the boards: device number, whether Flower knows them, and whether they are online or were last seen."""
    from server.link.devices import Devices
    from server.link.flower import Flower, FlowerError
    from server.link.folder import ServerFolder

    found = ServerFolder.open(folder)
    running, nodes = found.running(), {}
    remark = "no server runs on this folder (lightcl server run), so who is online is not known"
    if running and "port" in running:
        try:
            nodes, remark = Flower(found, int(running["port"])).nodes(), ""
        except FlowerError as error:
            remark = f"the server does not answer ({error}); it may be starting: ask again"
    rows = [row_of(one, nodes, known=not remark, keys=not found.settings.insecure) for one in Devices(found).all()]
    if as_json:
        sys.stdout.write(json.dumps(rows, indent=2) + "\n")
    else:
        _print(rows, found.settings.devices)
    if remark:
        typer.echo(remark, err=True)
    if found.settings.insecure:
        typer.echo("this server is --insecure: it cannot tell which board a connection comes from", err=True)


def row_of(device: Device, nodes: dict[str, Node], *, known: bool, keys: bool) -> dict[str, str | int]:
    """What is known of a board; `known`: whether Flower was asked. `state` is empty where it was not."""
    node = nodes.get(device.node)
    state = {"": "", "registered": "never seen"}.get(node.status if node else "", node.status if node else "")
    registered = "without keys" if not keys else "yes" if node or (device.node and not known) else "no"
    return {
        "name": device.name, "device": device.device, "registered": registered, "state": state,
        "since": node.seen if node else "", "added": device.added,
    }  # fmt: skip


def _print(rows: list[dict[str, str | int]], devices: int) -> None:
    from rich.console import Console
    from rich.table import Table

    if not rows:
        typer.echo("no boards; add one with `lightcl server add-device NAME`")
        return
    table = Table(title=f"{len(rows)} of {devices} boards")
    for heading in rows[0]:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console(emoji=False).print(table)
