"""Addresses of Ray clusters: whether something listens there."""

from __future__ import annotations

import socket
from contextlib import closing

from lightcl.errors import RequestError

ANSWER_SECONDS = 5.0


def host_and_port(address: str) -> tuple[str, int]:
    """`HOST:PORT`, `[IPv6]:PORT` or either after `ray://`."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    return host.strip("[]"), int(port)


def listens(address: str, timeout: float = ANSWER_SECONDS) -> bool:
    """Whether a TCP connection to `address` opens within `timeout` seconds."""
    try:
        with closing(socket.create_connection(host_and_port(address), timeout)):
            return True
    except OSError:
        return False


def check_reachable(address: str) -> None:
    """Raises RequestError if nothing listens at `address`; `auto` is known only once Ray has looked for a cluster.

    Ray itself would wait for minutes.
    """
    if address != "auto" and not listens(address):
        raise RequestError(
            f"simulation.address is {address!r}, but nothing listens there; start a cluster with `ray start --head`, "
            "or leave the key out to use this machine alone"
        )
