"""What the two HTTP servers of a board share: any program that reaches them may send them anything."""

from __future__ import annotations

import sys
from email.message import Message
from http.server import ThreadingHTTPServer
from typing import Any

MOST_DIGITS = 12
"""Of a Content-Length; Python refuses to read a number of thousands of digits."""


def content_length(headers: Message) -> int | None:
    """Bytes of the body; None where the request does not say, `sys.maxsize` where the number is endless."""
    text = headers.get("Content-Length", "")
    if not text.isdecimal():
        return None
    return int(text) if len(text) <= MOST_DIGITS else sys.maxsize


class LocalServer(ThreadingHTTPServer):
    """One thread per connection; a client that leaves before it has its answer is no error."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)
