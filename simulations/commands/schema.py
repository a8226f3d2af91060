"""`lightcl schema`: the keys of a scenario, for editors and for the docs."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from simulations.options import Command, Plugins, command_app, use_plugins

app = command_app()


@app.command(cls=Command)
def schema(
    markdown: Annotated[bool, typer.Option("--markdown", help="All keys with their defaults, as a table")] = False,
    plugins: Plugins = None,
) -> None:
    """Print the JSON schema of a scenario, for editors."""
    from lightcl.scenario import scenario_keys, scenario_schema

    use_plugins(plugins or [])
    sys.stdout.write(scenario_keys() if markdown else json.dumps(scenario_schema(), indent=2) + "\n")
