"""The systemd unit of a server."""

from __future__ import annotations

import getpass
import sys
from pathlib import Path

from lightcl.errors import RequestError
from lightcl.storage.files import write_atomically
from lightcl.systemd import argument_word, escaped, program_word
from server.link.folder import ServerFolder

NAME = "lightcl-server"
_UNIT = """\
[Unit]
Description=LightCL: server of a fleet of boards
Wants=network-online.target
After=network-online.target time-sync.target
# The server restarts SuperLink itself; a server that cannot start at all is tried again without end.
StartLimitIntervalSec=0

[Service]
Type=exec
{user}WorkingDirectory={home}
ExecStart={program} server run --folder {folder}
Environment=FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 PYTHONUNBUFFERED=1
Restart=always
RestartSec=10
# 130: stopped by SIGTERM or Ctrl-C.
SuccessExitStatus=130
TimeoutStopSec=60
KillMode=mixed
UMask=0077
NoNewPrivileges=true

[Install]
WantedBy={target}
"""


def unit(folder: ServerFolder, *, user: bool) -> str:
    """The text of the unit; without `user`, the system's unit runs the server as this user. Raises RequestError."""
    program = Path(sys.executable).parent / "lightcl"
    if not program.exists():
        raise RequestError(f"{program} is not there; install lightcl-fleet into this environment first")
    return _UNIT.format(
        user="" if user else f"User={getpass.getuser()}\n",
        home=escaped(str(Path.home())),  # this key takes no quotes
        program=program_word(program),
        folder=argument_word(folder.path),
        target="default.target" if user else "multi-user.target",
    )


def write_unit(text: str, *, user: bool) -> Path:
    """Writes the unit where systemd finds it. Raises RequestError."""
    place = Path.home() / ".config" / "systemd" / "user" if user else Path("/etc/systemd/system")
    file = place / f"{NAME}.service"
    try:
        place.mkdir(parents=True, exist_ok=True)
        write_atomically(file, text)
    except OSError as error:
        raise RequestError(
            f"{file} cannot be written ({error.strerror}); run it with sudo and the full path of lightcl and --folder, "
            "or use --user, or --print and copy the text yourself"
        ) from error
    return file
