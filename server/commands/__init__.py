"""`lightcl server ...`: commands for the person who runs the server of a fleet of boards, one file each.

Light at import.
"""

from __future__ import annotations

import typer

from server.commands.add_device import add_device
from server.commands.check import check
from server.commands.devices import devices
from server.commands.init import init
from server.commands.install import install
from server.commands.keys import keys
from server.commands.run import run
from server.commands.start import start

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _server() -> None:
    """Commands for the server of a fleet of boards."""


for command in (init, add_device, devices, keys, run, start, check, install):
    app.command()(command)
