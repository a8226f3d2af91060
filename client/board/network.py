"""Whether a server can be reached, in words for a person."""

from __future__ import annotations

import socket


def split_address(address: str) -> tuple[str, int]:
    """HOST and PORT of `HOST:PORT`; an IPv6 address stands in brackets. Raises ValueError."""
    host, colon, port = address.rpartition(":")
    host = host.strip("[]")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65536 or any(map(str.isspace, host)):
        raise ValueError(f"{address!r} is not HOST:PORT")
    return host, int(port)


def unresolved(host: str, error: socket.gaierror) -> str:
    return f"the name {host!r} cannot be resolved ({error.strerror}); check the name and DNS, or use an IP address"


def reach(address: str, timeout: float = 5.0) -> str:
    """Opens a connection to HOST:PORT and closes it; returns what is wrong, or an empty text."""
    host, port = split_address(address)
    try:
        socket.create_connection((host, port), timeout).close()
    except socket.gaierror as error:
        return unresolved(host, error)
    except TimeoutError:
        return f"{address} does not answer within {timeout:.0f} s; check the address, cable and firewall"
    except OSError as error:
        return f"{address}: {error.strerror or error}; is the server running (`lightcl server run`)?"
    return ""
