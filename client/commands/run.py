"""`lightcl device run`: the program of a board, which a service keeps running."""

from __future__ import annotations

from client.commands.shared import ConfigFile, file_of, load


def run(config: ConfigFile = None) -> None:
    """Run this board: connect to the server, learn when it asks, reconnect after a loss, until Ctrl-C or SIGTERM.

    Writes to a log that `lightcl device logs` shows. `lightcl device install` makes a service of it.
    """
    from client.board import supervise

    supervise.run(load(config), file_of(config))
