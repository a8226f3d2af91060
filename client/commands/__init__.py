"""`lightcl device ...`: commands for the person who sets up a board, one file each. Light at import."""

from __future__ import annotations

import typer

from client.commands.check import check
from client.commands.doctor import doctor
from client.commands.init import init
from client.commands.install import install
from client.commands.label import label
from client.commands.predict import predict
from client.commands.run import run
from client.commands.serve import serve
from client.commands.status import logs, status

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _device() -> None:
    """Commands for a board."""


for command in (init, doctor, run, status, logs, install, check, predict, serve, label):
    app.command()(command)
