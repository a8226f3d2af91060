"""`lightcl device install`: makes a systemd service of a board."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from client.commands.shared import ConfigFile, file_of, load
from lightcl.errors import Failure, RequestError


def install(
    config: ConfigFile = None,
    user: Annotated[
        bool, typer.Option("--user", help="A service of this user, without root; it stops at logout without lingering")
    ] = False,
    only_print: Annotated[bool, typer.Option("--print", help="Print the unit and change nothing")] = False,
) -> None:
    """Make `lightcl device run` a systemd service: started at boot, restarted when it ends or hangs, memory limited.

    Without --user this needs root; the service then runs as the owner of the configuration file.
    """
    import pwd

    from client.board.unit import unit_text

    board, file = load(config), file_of(config)
    owner = "" if user else pwd.getpwuid(file.stat().st_uid).pw_name
    text = unit_text(name=board.name, program=_program(), config=file, user=owner, memory_mb=board.memory_mb)
    if only_print:
        sys.stdout.write(text)
        return
    unit = _folder(user) / f"lightcl-{file.stem}.service"
    if not shutil.which("systemctl"):
        raise RequestError("systemd is not on this machine; --print shows the unit, for another supervisor see deploy/")
    try:
        unit.parent.mkdir(parents=True, exist_ok=True)
        unit.write_text(text)
    except OSError as error:
        advice = "use --user" if user is False else "check the folder"
        raise RequestError(
            f"{unit} cannot be written ({error.strerror}); run it with sudo and --config {file}, or {advice}"
        ) from error
    systemctl = ["systemctl", *(["--user"] if user else [])]
    for command in (["daemon-reload"], ["enable", "--now", unit.name]):
        done = subprocess.run([*systemctl, *command], capture_output=True, text=True, check=False)
        if done.returncode:
            raise Failure(f"{unit} is written, but `{' '.join([*systemctl, *command])}` failed: {done.stderr.strip()}")
    journal = f"journalctl {'--user ' if user else ''}-u {unit.stem}"
    typer.echo(f"{unit}: enabled and started; see it with `lightcl device status` and `{journal}`")
    if user:
        linger = f"loginctl enable-linger {os.environ.get('USER', '')}"
        typer.echo(f"To start it at boot and keep it running after logout: {linger}")


def _program() -> Path:
    """The `lightcl` of this environment."""
    beside = Path(sys.executable).with_name("lightcl")
    found = beside if beside.exists() else shutil.which("lightcl")
    if not found:
        raise RequestError("the program `lightcl` is not installed beside this Python; install the package first")
    return Path(found).absolute()


def _folder(user: bool) -> Path:
    if user:
        return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "systemd" / "user"
    return Path("/etc/systemd/system")
