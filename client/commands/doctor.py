"""`lightcl device doctor`: whether this board is ready, and what to do where it is not."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Annotated

import typer

from client.commands.check import Check, report, run_checks
from client.commands.shared import ConfigFile, file_of, load
from lightcl.errors import Failure, RequestError


def doctor(
    scenario: Annotated[Path | None, typer.Argument(metavar="[SCENARIO]")] = None,
    config: ConfigFile = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a key, e.g. fleet.devices=3; repeatable"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the checks as JSON")] = False,
) -> None:
    """Check this board: Python, PyTorch, a real training step on the accelerator, disk, state, data, clock, server,
    TLS, key, sensors; with SCENARIO also its images, network, and memory against what is free.

    Each failed check says what to do. The exit code is 1 if a check fails.
    """
    if changes and scenario is None:
        raise RequestError("--set changes a scenario: name a SCENARIO")
    board, file = load(config), file_of(config)
    loaded = None
    if scenario is not None:
        from lightcl.scenario import load_scenario

        loaded = load_scenario(scenario, changes or [])
    from client.board import checks

    answer = cache(lambda: checks.ask(board))
    acts: dict[str, Callable[[], str]] = {
        "python": lambda: checks.check_python(board),
        "pytorch": lambda: checks.check_torch(board),
        "accelerator": lambda: checks.check_kernel(board, loaded.device.accelerator if loaded else "auto"),
        "disk": lambda: checks.check_disk(board),
        "state": lambda: checks.check_state(board),
        "data": lambda: checks.check_data(board),
        "certificate": lambda: checks.check_certificate(board),
        "key": lambda: checks.check_key(board),
        "name": lambda: checks.check_name(board),
        "port": lambda: checks.check_port(board),
        "tls": lambda: checks.check_tls(answer()),
        "clock": lambda: checks.check_clock(answer()),
        "server": lambda: checks.check_accepted(board, file),
        "sensors": lambda: checks.check_sensors(board),
    }
    found = run_board_checks(acts)
    if loaded is not None:
        own = run_checks(loaded, board.node_config(), memory_mb=board.memory_mb, machine=False)
        found += [Check(f"scenario: {one.name}", one.passed, one.text) for one in own]
    report(found, as_json=as_json)


_NEEDS = {"tls": "port", "clock": "tls", "server": "tls", "port": "name"}
"""Checks that say nothing new where an earlier one failed."""


def run_board_checks(acts: dict[str, Callable[[], str]]) -> list[Check]:
    """The outcome of each check in order; one that needs another which failed is left out."""
    found: dict[str, Check] = {}
    for name, act in acts.items():
        if (needed := _NEEDS.get(name)) and not (needed in found and found[needed].passed):
            continue
        try:
            found[name] = Check(name, True, act())
        except (RequestError, Failure) as error:
            found[name] = Check(name, False, str(error))
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            found[name] = Check(
                name, False, f"{where}{error.strerror or error}; check that this user has the right to it"
            )
    return list(found.values())
