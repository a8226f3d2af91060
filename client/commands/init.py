"""`lightcl device init`: makes a board's configuration file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from client.commands.shared import ConfigFile, file_of
from lightcl.errors import RequestError

_REQUIRED = {
    "server": "Address of the server, HOST:PORT",
    "device": "Number of this board in the fleet, from 0",
    "devices": "Number of boards in the fleet",
}


def init(
    config: ConfigFile = None,
    join: Annotated[
        Path | None,
        typer.Option("--join", metavar="FILE", help="The file that `lightcl server add-device` wrote for this board"),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name in the records; default: the host name")] = None,
    device: Annotated[int | None, typer.Option(help="Which device of the fleet this board is, from 0")] = None,
    devices: Annotated[int | None, typer.Option(help="Devices in the fleet")] = None,
    server: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Address of the server")] = None,
    data: Annotated[str | None, typer.Option(metavar="PATH", help="Its own images, in place of data.path")] = None,
    own_data: Annotated[
        bool | None, typer.Option("--own-data", help="All of these images are this board's, not its share of them")
    ] = None,
    delete_learned: Annotated[
        bool | None,
        typer.Option("--delete-learned", help="Learned images may be deleted, as data.keep of a scenario says"),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(metavar="FILE", help="Pre-trained weights, in place of network.weights")
    ] = None,
    state: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Folder for state and log; default ~/.local/state/lightcl")
    ] = None,
    certificate: Annotated[
        str | None, typer.Option(metavar="FILE", help="Certificate of the server's authority (PEM)")
    ] = None,
    key: Annotated[
        str | None, typer.Option(metavar="FILE", help="Private key of this board (OpenSSH); default: a new one")
    ] = None,
    insecure: Annotated[
        bool | None, typer.Option("--insecure", help="No TLS and no key: only in a network that you trust")
    ] = None,
    accelerator: Annotated[str | None, typer.Option(help="auto, cpu or cuda, in place of the scenario's")] = None,
    threads: Annotated[int | None, typer.Option(help="PyTorch threads, in place of the scenario's")] = None,
    memory_mb: Annotated[int | None, typer.Option("--memory-mb", help="Memory budget in megabytes")] = None,
    temperature_c: Annotated[
        float | None, typer.Option("--limit-temperature", help="Back off above this many degrees Celsius")
    ] = None,
    free_disk_mb: Annotated[
        int | None, typer.Option("--limit-free-disk-mb", help="Back off with less free disk than this many megabytes")
    ] = None,
    battery_percent: Annotated[
        int | None, typer.Option("--limit-battery", help="Back off with less battery than this percentage")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing configuration")] = False,
) -> None:
    """Make this board's configuration: from the file that the server made for it (--join), or from options.

    Options replace what is in the join file. On a terminal, missing values are asked for. A board without a key makes
    one and prints the public half, which the server needs.
    """
    given = {
        "name": name, "device": device, "devices": devices, "server": server, "data": data, "own_data": own_data,
        "delete_learned": delete_learned, "weights": weights, "state": state, "certificate": certificate, "key": key,
        "insecure": insecure, "accelerator": accelerator, "threads": threads, "memory_mb": memory_mb,
        "limits": _set(
            {"temperature_c": temperature_c, "free_disk_mb": free_disk_mb, "battery_percent": battery_percent}
        ),
    }  # fmt: skip
    file = file_of(config)
    if file.exists() and not overwrite:
        raise RequestError(f"{file} exists; use --overwrite, or another file (--config)")
    values, certificate_text, key_text = _joined(join, _set(given))
    _ask(values)

    from client.board.config import config_of
    from client.board.setup import PUBLIC_SUFFIX, write_files

    board = config_of(values, "lightcl device init", Path.cwd())
    board, public = write_files(file, board, certificate=certificate_text, key=key_text, overwrite=overwrite)
    typer.echo(f"{file}: {board.name}, device {board.device} of {board.devices}, server {board.server}")
    if public:
        copy = file.with_suffix(PUBLIC_SUFFIX)
        typer.echo(f"\nThe public key of this board, also in {copy}:\n{public}")
        typer.echo("Copy the file to the server, and there: lightcl server add-device NAME --public-key FILE")
    if board.insecure:
        typer.echo("The connection is not encrypted, and anyone who can reach the server can join.")
    typer.echo("\nNext: lightcl device doctor, then lightcl device run")


def _set(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None and value != {}}


def _joined(join: Path | None, given: dict[str, Any]) -> tuple[dict[str, Any], str, str]:
    """The values with those of the join file below them, and its certificate and key as texts."""
    if join is None:
        return given, "", ""
    from lightcl.exchange.join import JoinFile

    found = JoinFile.read(join)
    values: dict[str, Any] = {
        "name": found.name, "device": found.device, "devices": found.devices, "server": found.server,
    }  # fmt: skip
    certificate = "" if "certificate" in given else found.certificate
    if not certificate and "certificate" not in given:
        values["insecure"] = True
    return {**values, **given}, certificate, "" if "key" in given else found.key


def _ask(values: dict[str, Any]) -> None:
    """Adds what is missing: asked for on a terminal, else a RequestError. The name defaults to the host's."""
    import socket

    missing = [key for key in _REQUIRED if key not in values]
    if missing and not sys.stdin.isatty():
        options = ", ".join(f"--{key}" for key in missing)
        raise RequestError(f"device init: {options} missing; give them, or --join with the file that the server made")
    if missing and "name" not in values:
        values["name"] = typer.prompt("Name of this board", default=socket.gethostname())
    for key in missing:
        values[key] = typer.prompt(_REQUIRED[key], type=str if key == "server" else int)
    values.setdefault("name", socket.gethostname())
