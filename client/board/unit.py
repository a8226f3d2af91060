"""The systemd unit of a board."""

from __future__ import annotations

from pathlib import Path

from lightcl.systemd import argument_word, escaped, program_word

WATCHDOG_SECONDS = 60

_TEMPLATE = """\
# Written by `lightcl device install`. After a change: systemctl {scope}daemon-reload, then restart the unit.
[Unit]
Description=LightCL board {name}
Wants=network-online.target
After=network-online.target
StartLimitIntervalSec=0

[Service]
Type=notify
NotifyAccess=main
ExecStart={program} device run --config {config}
{user}Environment=PYTHONUNBUFFERED=1
Restart=always
RestartSec=10
WatchdogSec={watchdog}
KillMode=mixed
TimeoutStopSec=30
{memory}StandardOutput=journal
StandardError=journal
NoNewPrivileges=yes

[Install]
WantedBy={target}
"""


def unit_text(*, name: str, program: Path, config: Path, user: str, memory_mb: int) -> str:
    """The unit; without `user` it is one for `systemctl --user`. `memory_mb` 0: no limit on all processes together."""
    return _TEMPLATE.format(
        name=escaped(name), program=program_word(program), config=argument_word(config), watchdog=WATCHDOG_SECONDS,
        scope="" if user else "--user ", user=f"User={user}\n" if user else "",
        memory=f"MemoryMax={memory_mb}M\n" if memory_mb else "",
        target="multi-user.target" if user else "default.target",
    )  # fmt: skip
