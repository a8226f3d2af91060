"""The hardware under a device: accelerator, threads, and the physical memory of this process as Linux counts it."""

from __future__ import annotations

import ctypes
import re
import resource
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Literal

import torch

from lightcl.errors import RequestError

KEPT = 128 * 2**20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGEST_THRESHOLD = 32 * 2**20


def resident(key: Literal["VmRSS", "VmHWM"]) -> int | None:
    """Resident bytes: now (VmRSS) or at the peak (VmHWM); None where the system does not report them."""
    try:
        found = re.search(rf"^{key}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def reset_peak() -> None:
    """Restarts the peak of resident memory. Where this is not allowed, the peak is that of the process's lifetime."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """The peak of resident memory since `reset_peak`, in bytes."""
    return resident("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def choose_accelerator(wanted: str) -> torch.device:
    """Raises RequestError where cuda is requested and not available."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise RequestError("device.accelerator is 'cuda', but this machine has no CUDA device (allowed: auto, cpu)")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def gpu_uuid(accelerator: torch.device) -> str | None:
    """The name by which NVML knows the GPU that a device trains on; None without one."""
    if accelerator.type != "cuda":
        return None
    uuid = getattr(torch.cuda.get_device_properties(accelerator), "uuid", None)
    return f"GPU-{uuid}" if uuid else None


@cache
def keep_freed_memory() -> bool:
    """Lets glibc keep up to `KEPT` freed bytes for the next tensors; returns whether it does.

    By default it gives larger blocks back to Linux at once, and every step faults the same pages in again, cleared:
    several percent of its time.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # not glibc
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_THRESHOLD)) and bool(mallopt(_M_TRIM_THRESHOLD, KEPT))


def set_up_torch(accelerator: torch.device, threads: int) -> None:
    """Sets the number of threads; on a GPU also deterministic kernels, and full fp32 instead of TF32."""
    keep_freed_memory()
    torch.set_num_threads(threads)
    if accelerator.type == "cuda":
        cudnn = torch.backends.cudnn
        cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic = False, False, True
