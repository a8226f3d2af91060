"""The `lightcl` program. Exit codes: 0 done, 1 the run failed, 2 the request was wrong, 130 interrupted, 141 the reader
of the output is gone (`| head -1`).

Commands are loaded when they run: `lightcl --help` imports none of them, and a command's own help imports neither
PyTorch nor Flower. A new command is one line of COMMANDS and one module with a function of that name, or with a
`typer.Typer` named `app`.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Annotated, Any

import click
import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperCommand

from lightcl.errors import Failure, RequestError, Stopped
from simulations.entry import INTERRUPTED, end_quietly, handle_signals, output_handle, pipe_closed
from simulations.options import Command, Group, command_app

COMMANDS: dict[str, tuple[str, str]] = {
    # name: (module, one line of help)
    "simulate": ("simulations.commands.simulate", "Simulate a fleet of devices and write a report"),
    "train": ("simulations.commands.train", "Train one device of the fleet, without Flower"),
    "validate": ("simulations.commands.validate", "Check a scenario against its data and weights without running it"),
    "scenarios": ("simulations.commands.scenarios", "List, show and copy the bundled scenarios"),
    "schema": ("simulations.commands.schema", "Print the JSON schema of a scenario, for editors"),
    "analyze": ("simulations.commands.analyze", "Measure how general each block is and choose a freeze point"),
    "footprint": ("simulations.commands.footprint", "Count FLOPs and memory of training, per method"),
    "plan": ("simulations.commands.plan", "Fit a LightCL scenario into a memory budget"),
    "pretrain": ("simulations.commands.pretrain", "Train the network whose first blocks are frozen as the prefix"),
    "export": ("simulations.commands.export", "Export a trained model to ONNX, TorchScript or safetensors"),
    "report": ("simulations.commands.report", "Rebuild the report of a run"),
    "sweep": (
        "simulations.sweeps.commands",
        "Run a scenario over a grid of keys and seeds",
    ),
    "compare": ("simulations.commands.compare", "Compare runs side by side, as a table and a page"),
    "cache": ("simulations.commands.cache", "List, delete and fill the cache of prefix outputs"),
    "device": ("client.commands", "Check a board before it joins a fleet"),
    "server": ("server.commands", "Run the server of a fleet of boards"),
}

RESUME_ADVICE = {
    **dict.fromkeys(("simulate", "train", "sweep"), "; progress is saved, continue with --resume"),
    "pretrain": "; progress is saved, run the same command again to continue",
}
"""Printed after an interruption; the other commands write nothing before they are done."""


class LazyGroup(Group):
    """Lists the commands from the table and imports a command's module only when the command runs."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """A placeholder with the help text of the table; `resolve_command` replaces it."""
        return TyperCommand(name, help=COMMANDS[name][1]) if name in COMMANDS else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        resolved, _, rest = super().resolve_command(ctx, args)
        return resolved, load_command(resolved) if resolved else None, rest


def load_command(name: str) -> click.Command:
    """What a module of the table defines: a `typer.Typer` named `app`, or a function with the name of the command."""
    module = importlib.import_module(COMMANDS[name][0])
    found = getattr(module, "app", None)
    if found is None:
        found = command_app()
        found.command(cls=Command)(getattr(module, name.replace("-", "_")))
    found.info.cls = Group
    command = typer.main.get_command(found)
    command.name = name
    return command


app = typer.Typer(
    cls=LazyGroup,
    help="Continual learning on fleets of edge devices: LightCL on each device, Flower between them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import PackageNotFoundError, version

        try:
            number = version("lightcl-fleet")
        except PackageNotFoundError:
            number = "(a checkout that is not installed)"
        typer.echo(f"lightcl {number}")
        raise typer.Exit


@app.callback()
def _lightcl(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Show the version and exit")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point: turns exceptions into one screen of text and an exit code."""
    handle_signals()
    output = output_handle()
    try:
        app(prog_name="lightcl")
    except RequestError as error:
        _print_error("error:", error)
        sys.exit(2)
    except Failure as error:
        _print_error("the run failed:", error)
        sys.exit(1)
    except (KeyboardInterrupt, Stopped):
        _end_interrupted()
    except BrokenPipeError:
        end_quietly()
    except SystemExit as ended:
        if ended.code == INTERRUPTED:  # Typer turns a KeyboardInterrupt of a command into this
            _end_interrupted()
        if ended.code == 1 and pipe_closed(output):  # Click and Rich turn a BrokenPipeError into this
            end_quietly()
        raise


def _print_error(heading: str, error: Exception) -> None:
    console = Console(stderr=True, emoji=False)
    console.print(f"[red]{heading}[/] {escape(str(error))}", highlight=False, soft_wrap=True)


def _end_interrupted() -> Any:
    advice = RESUME_ADVICE.get(sys.argv[1] if len(sys.argv) > 1 else "", "")
    Console(stderr=True, emoji=False).print(f"interrupted{advice}", highlight=False)
    sys.stdout.flush()
    os._exit(INTERRUPTED)  # Ray, shut down by a signal, aborts when the interpreter ends in the usual way


if __name__ == "__main__":
    main()
