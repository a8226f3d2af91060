"""What this process holds in physical memory, as Linux counts it: everything, PyTorch's own code included."""

from __future__ import annotations

import re
import resource
from contextlib import suppress
from pathlib import Path
from typing import Literal


def resident(key: Literal["VmRSS", "VmHWM"]) -> int | None:
    """Bytes that are resident now, or were at the highest; None where the system does not say."""
    try:
        found = re.search(rf"^{key}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def reset_peak() -> None:
    """Lets the highest count anew from now on. Not allowed everywhere; it is then that of the process's whole life."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """The most bytes that were resident at once since `reset_peak`."""
    return resident("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
