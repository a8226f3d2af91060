"""Arguments and options that several commands share, and how commands format numbers. Imports nothing heavy."""

from __future__ import annotations

import importlib
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click
import typer
from typer.core import TyperCommand, TyperGroup

from lightcl.errors import RequestError, nearest

if TYPE_CHECKING:
    from rich.console import Console

    from lightcl.scenario import Scenario

ARGUMENTS = {
    "scenario": "A YAML file, or the name of a bundled scenario (`lightcl scenarios list`), or - for the standard "
    "input; all keys: docs/reference/scenario-keys.md",
    "run": "A run folder, as given to --out of simulate or train",
    "runs": "Run folders, or sweep folders (all their runs)",
    "name": "Name of a bundled scenario",
    "file": "The YAML file to write",
}


class Command(TyperCommand):
    """Sets the help of arguments by their name: that of `typer.Argument` is lost between Typer 0.20 and Click 8.5."""

    def __init__(self, *args: Any, params: list[Any] | None = None, **options: Any) -> None:
        for parameter in params or []:
            if parameter.name in ARGUMENTS and parameter.param_type_name == "argument":
                parameter.help = ARGUMENTS[parameter.name]
        super().__init__(*args, params=params, **options)


class Group(TyperGroup):
    """A group whose unknown commands are answered with the nearest one, once, and with all there are."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name, known = args[0], self.list_commands(ctx)
        if name not in known and not name.startswith("-"):
            allowed = ", ".join(known)
            raise click.UsageError(f"No such command {name!r}{nearest(name, known)} (commands: {allowed})", ctx)
        return super().resolve_command(ctx, args)


ScenarioFile = Annotated[Path, typer.Argument(metavar="SCENARIO")]
OptionalScenarioFile = Annotated[Path | None, typer.Argument(metavar="SCENARIO")]
RunPath = Annotated[Path, typer.Argument(metavar="RUN")]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a key, e.g. training.epochs=5; repeatable"),
]
Plugins = Annotated[
    list[Path] | None,
    typer.Option(
        "--plugin",
        metavar="FILE",
        help="Load methods, networks, data sources or partitioners from a .py file; repeatable",
    ),
]
OutFolder = Annotated[Path | None, typer.Option("--out", help="Run folder; default: runs/<scenario's name>-<seed>")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the interrupted run in --out")]
NoReport = Annotated[bool, typer.Option("--no-report", help="Write no page; lightcl report makes it later")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the run in --out")]
JsonTo = Annotated[str | None, typer.Option("--json", metavar="FILE|-", help="Write JSON; - prints it")]


def command_app() -> typer.Typer:
    """An app for one command or a group of commands, with the settings of the whole program."""
    return typer.Typer(
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        add_completion=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )


def console(*, stderr: bool = False) -> Console:
    """The console that a command prints to; emoji codes are not replaced."""
    from rich.console import Console

    return Console(stderr=stderr, emoji=False)


def command_line() -> str:
    """The command as typed, for the records of a run."""
    return shlex.join(["lightcl", *sys.argv[1:]])


def read_scenario(
    file: Path, changes: Sequence[str] | None, plugins: Sequence[Path] | None, *, analyzed: bool = False
) -> Scenario:
    """Loads the plugins, then the scenario with its changes; warns of keys without effect. Raises RequestError.

    `analyzed`: for `lightcl analyze`, which reads keys that nothing else does.
    """
    from lightcl.scenario import keys_without_effect, load_scenario

    use_plugins(plugins or [])
    loaded = load_scenario(file, changes or [])
    for line in keys_without_effect(loaded, analyzed=analyzed):
        console(stderr=True).print(f"warning: {line}", style="yellow", highlight=False, markup=False, soft_wrap=True)
    return loaded


def use_plugins(files: Sequence[Path]) -> None:
    """Loads plugin files here and in the processes that this one starts (lightcl/plugins.py). Raises RequestError."""
    if files:
        importlib.import_module("lightcl.plugins").load_plugins(files)


def check_device(number: int, scenario: Scenario) -> None:
    """Raises RequestError for a device number outside the fleet."""
    count = scenario.fleet.devices
    if number >= count:
        raise RequestError(f"--device {number}: the fleet has {amount(count, 'device')} (allowed: 0 to {count - 1})")


def methods_named(text: str) -> list[str]:
    """`sgd,lightcl` -> the methods, each once. Raises RequestError for an unknown one."""
    from lightcl.scenario import method_names

    known = method_names()
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise RequestError(
                f"--methods: unknown method {name!r}{nearest(name, known)} (allowed: {', '.join(known)})"
            )
    return list(dict.fromkeys(names))


def amount(number: int, one: str, more: str = "") -> str:
    """`1 task`, `2 tasks`; `more` is the plural where it is not formed with an s."""
    return f"{number} {one if number == 1 else more or one + 's'}"


def number_ranges(numbers: Sequence[int]) -> str:
    """Sorted numbers as `0–3, 7`; after a dozen pieces the rest is only counted."""
    pieces: list[list[int]] = []
    for number in numbers:
        if pieces and number == pieces[-1][-1] + 1:
            pieces[-1] = [pieces[-1][0], number]
        else:
            pieces.append([number])
    shown = ", ".join("–".join(map(str, piece)) for piece in pieces[:12])
    return shown if len(pieces) <= 12 else f"{shown} … ({len(numbers)} in all)"
