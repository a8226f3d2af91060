"""How much one board may send: requests per second, and bytes per reply."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

MOST_SENDERS = 10_000
"""Senders that are remembered; those that were quiet the longest are forgotten first."""
BURST_SECONDS = 20.0
"""A quiet board may send this many seconds' worth of requests at once: a reply is one request per tensor or two."""


@dataclass
class _Sender:
    tokens: float
    at: float
    reply_bytes: int = 0


class Limits:
    """Counts what each sender sends. `clock` gives seconds."""

    def __init__(self, requests_per_second: int, reply_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._reply_bytes, self._clock = requests_per_second, reply_bytes, clock
        self._senders: OrderedDict[str, _Sender] = OrderedDict()

    def wait_for(self, sender: str) -> float:
        """Counts a request; returns the seconds after which it may be passed on."""
        one, now = self._sender(sender), self._clock()
        one.tokens = min(self._rate * BURST_SECONDS, one.tokens + (now - one.at) * self._rate)
        one.at = now
        one.tokens -= 1
        return max(0.0, -one.tokens / self._rate)

    def accepts(self, sender: str, size: int, *, begins: bool) -> bool:
        """Counts bytes of a reply, which `begins` with this request or goes on; False once it is too long."""
        one = self._sender(sender)
        one.reply_bytes = size if begins else one.reply_bytes + size
        return one.reply_bytes <= self._reply_bytes

    def _sender(self, sender: str) -> _Sender:
        one = self._senders.pop(sender, None) or _Sender(self._rate * BURST_SECONDS, self._clock())
        self._senders[sender] = one
        if len(self._senders) > MOST_SENDERS:
            self._senders.popitem(last=False)
        return one
