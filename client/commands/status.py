"""`lightcl device status` and `logs`: what a board is doing, and what it said."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from client.board.status import CONTACT_SECONDS
from client.commands.shared import ConfigFile, duration, load
from lightcl.errors import RequestError


def status(
    config: ConfigFile = None, as_json: Annotated[bool, typer.Option("--json", help="Print the status as JSON")] = False
) -> None:
    """Show what this board is doing: running, connected, the last message, task and epoch, disk, the newest state.

    The exit code is 1 if the board is not running.
    """
    from client.board.config import BoardConfig

    board: BoardConfig = load(config)
    values = status_of(board.state_folder, board.board_folder)
    if as_json:
        sys.stdout.write(json.dumps({"name": board.name, "server": board.server, **values}, indent=2) + "\n")
    else:
        for line in _lines(board.name, board.server, values):
            typer.echo(line)
    if not values["running"]:
        raise typer.Exit(1)


def status_of(state_folder: Path, board_folder: Path) -> dict[str, Any]:
    """What the node wrote, with `running`, `free_mb` (None without a folder), `newest_state` (path and time), and
    `field`: what the newest run waits for, None where it collects no images."""
    from client.board.status import read_status
    from client.board.supervise import is_running

    newest = max(state_folder.glob("*/device-*/state.json"), key=lambda file: file.stat().st_mtime, default=None)
    running = is_running(board_folder)
    written = read_status(board_folder)
    return {
        **written,
        "running": running,
        "connected": running and bool(written.get("connected")),
        "free_mb": shutil.disk_usage(state_folder).free // 10**6 if state_folder.exists() else None,
        "newest_state": newest and {"folder": str(newest.parent), "saved": newest.stat().st_mtime},
        "field": field_of(state_folder),
    }


def field_of(state_folder: Path) -> dict[str, Any] | None:
    """What waits in the folder of a board that collects images, by names alone; `text` is for people."""
    if not any(state_folder.glob("*/device-*/field/about.json")):  # the imports take a moment
        return None
    from client.board.field import newest_field
    from lightcl.data.field import FieldDamaged, NotReady

    if (tasks := newest_field(state_folder)) is None:
        return None
    plan = tasks.plan
    try:
        number, found = len(tasks.cut), tasks.waiting(inspect=False)
    except (FieldDamaged, NotReady) as error:
        return {"folder": plan.path, "text": str(error)}
    text = found.text(number, plan) if number < plan.tasks else f"all {plan.tasks} tasks have their images"
    return {
        "folder": plan.path, "task": number, "labeled": len(found.labeled), "needed": plan.ready_images,
        "unlabeled": found.unlabeled, "arriving": found.arriving, "problems": found.problems, "text": text,
    }  # fmt: skip


def _lines(name: str, server: str, values: dict[str, Any]) -> Iterator[str]:
    now = time.time()
    since = f" for {duration(now - values['started'])}" if values["running"] and "started" in values else ""
    yield f"board       {name}: {'running' + since if values['running'] else 'not running'}"
    if values["connected"]:
        silent = now - values.get("contact", now)
        quiet = f", silent for {duration(silent)}" if silent > 2 * CONTACT_SECONDS and not values.get("busy") else ""
        yield f"server      {server}: connected for {duration(now - values.get('connected_since', now))}{quiet}"
    else:
        yield f"server      {server}: not connected"
    busy, last = values.get("busy"), values.get("last")
    if busy and values["connected"]:
        yield f"now         {_message(busy)}, for {duration(now - busy['since'])}"
    if last:
        yield f"last        {_message(last)}, {duration(now - last['ended'])} ago, in {last['seconds']:.1f} s"
        if last.get("problem"):
            yield f"            {'waits' if last.get('waits') else 'refused'}: {last['problem']}"
    else:
        yield "last        no message so far"
    if values["field"]:
        yield f"field       {values['field']['text']}, in {values['field']['folder']}"
    state = values["newest_state"]
    yield f"state       {state['folder']}, saved {duration(now - state['saved'])} ago" if state else "state       none"
    free = values["free_mb"]
    yield f"disk        {free} MB free" if free is not None else "disk        the state folder does not exist so far"


def _message(about: dict[str, Any]) -> str:
    if about.get("task") is None:
        return str(about.get("type"))
    return f"{about['type']}, round {about['round']}, task {about['task']} until epoch {about['until_epoch']}"


def logs(
    config: ConfigFile = None,
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, help="Show this many of the last lines")] = 50,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Show new lines as they come, until Ctrl-C")] = False,
) -> None:
    """Show the log of `lightcl device run`."""
    from client.board.supervise import LOG

    file = load(config).board_folder / LOG
    if not file.exists():
        raise RequestError(f"{file} does not exist: `lightcl device run` has not run on this board so far")
    for line in last_lines(file, lines):
        typer.echo(line)
    for text in _new_text(file) if follow else ():
        sys.stdout.write(text)
        sys.stdout.flush()


def last_lines(file: Path, number: int) -> list[str]:
    """The last lines of the file, and of the one before it where that is needed."""
    found = file.read_text(errors="replace").splitlines()
    older = file.with_name(f"{file.name}.1")
    if len(found) < number and older.exists():
        found = older.read_text(errors="replace").splitlines() + found
    return found[-number:]


def _new_text(file: Path) -> Iterator[str]:
    """What is appended from now on, also after the file has been replaced by a new one."""
    opened = file.open(errors="replace")
    opened.seek(0, 2)
    while True:
        if text := opened.read():
            yield text
            continue
        time.sleep(0.5)
        if file.exists() and file.stat().st_ino != Path(f"/proc/self/fd/{opened.fileno()}").stat().st_ino:
            opened.close()
            opened = file.open(errors="replace")
