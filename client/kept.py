"""Devices that a worker of a simulation keeps open between training and test.

When the devices of a round have trained, the shared tensors move, and each device is tested with them. Opening a device
again for its test takes 5 to 10 ms, as long as testing it on some dozen images. So those that fit in `MOST_BYTES` stay
open, and the pool sends their tests to this worker (`simulations/runtime/pool.py`). A kept device is worth nothing more
than its saved state: whoever wants it and does not find it here, opens it from there, with the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from lightcl.device.device import EdgeDevice
from lightcl.export.model import Description

MOST_BYTES = 96 << 20
"""The most that the kept devices of a process take. That does not depend on the size of the fleet."""


@dataclass
class Opened:
    """A device at work; `about` describes its model."""

    device: EdgeDevice
    about: Description
    stays: bool = False
    """Whether the device is to be kept when the work is done."""


class _Kept(NamedTuple):
    opened: Opened
    stack: ExitStack
    """Closes the device."""
    size: int
    """Bytes in memory."""


class KeptDevices:
    """The devices of one round that wait for their test."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._most = most_bytes
        self._kept: dict[Hashable, _Kept] = {}
        self._round: Hashable = None

    @contextmanager
    def opened(
        self, round_of_run: Hashable, name: Hashable, open_device: Callable[[], AbstractContextManager[Opened]]
    ) -> Iterator[Opened]:
        """The device that is kept under this name, else the one that `open_device()` opens.

        After the work it is kept if it says so (`Opened.stays`) and there is room; nothing of an earlier round is.
        Nobody else may work with this device at the same time.
        """
        if round_of_run != self._round:
            self.close()
            self._round = round_of_run
        kept = self._take(name)
        with kept.stack if kept else ExitStack() as stack:
            opened = kept.opened if kept else stack.enter_context(open_device())
            opened.stays = False
            yield opened
            if opened.stays and self._bytes + (size := opened.device.bytes_in_memory) <= self._most:
                self._kept[name] = _Kept(opened, stack.pop_all(), size)

    @property
    def _bytes(self) -> int:
        return sum(kept.size for kept in self._kept.values())

    def close(self) -> None:
        """Closes all devices."""
        while self._kept:
            self._kept.popitem()[1].stack.close()

    def _take(self, name: Hashable) -> _Kept | None:
        """The device, which is not kept any more; None where there is none, or its saved state is newer."""
        kept = self._kept.pop(name, None)
        if kept and not kept.opened.device.is_as_saved():
            kept.stack.close()
            return None
        return kept
