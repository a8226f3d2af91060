"""`lightcl scenarios`: the scenarios that ship with the package."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from lightcl.errors import RequestError
from simulations.options import Command, command_app, console

HEADINGS = ("Cost", "Result")

app = command_app()
Name = Annotated[str, typer.Argument(metavar="NAME")]


@app.callback()
def _scenarios() -> None:
    """List, show and copy the bundled scenarios. Their names work wherever a command takes a SCENARIO."""


@app.command("list", cls=Command)
def list_scenarios() -> None:
    """List the bundled scenarios with their measured cost and result."""
    from lightcl.scenario import bundled_scenarios

    out = console()
    for name, file in bundled_scenarios().items():
        out.print(name, style="bold", highlight=False, markup=False)
        for heading, text in header(file.read_text(encoding="utf-8")).items():
            label = "" if heading == "About" else f"{heading.lower()}: "
            out.print(f"  {label}{text}", highlight=False, markup=False, soft_wrap=True)


@app.command(cls=Command)
def show(name: Name) -> None:
    """Print a bundled scenario."""
    sys.stdout.write(_bundled(name).read_text(encoding="utf-8"))


@app.command(cls=Command)
def copy(
    name: Name,
    file: Annotated[Path, typer.Argument(metavar="FILE")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace FILE")] = False,
) -> None:
    """Copy a bundled scenario into a file of your own."""
    from lightcl.storage.files import writable

    source = _bundled(name)
    with writable(file, "FILE"):
        if file.is_dir():
            raise RequestError(f"{file} is a folder; name a file, e.g. {file / source.name}")
        if file.exists() and not overwrite:
            raise RequestError(f"{file} exists; replace it with --overwrite")
        file.write_bytes(source.read_bytes())
    console().print(f"scenario: {file}", highlight=False, markup=False, soft_wrap=True)


def header(text: str) -> dict[str, str]:
    """The comment lines at the top of a scenario, without the marks: `About` (the first line), `Cost` and `Result`."""
    lines = [line.removeprefix("# ") for line in text.splitlines() if line.startswith("# ")]
    fields = {"About": lines[0]} if lines else {}
    for line in lines[1:]:
        name, _, rest = line.partition(": ")
        if name in HEADINGS:
            fields.setdefault(name, rest)
    return fields


def _bundled(name: str) -> Path:
    from lightcl.scenario import bundled_scenarios
    from lightcl.scenario.reading import unknown_scenario

    known = bundled_scenarios()
    if name not in known:
        raise unknown_scenario(name)
    return known[name]
