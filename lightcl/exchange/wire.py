"""How the tensors of a message travel.

Between real processes they are packed: all in one tensor of bytes. Flower sends, stores and confirms each tensor of a
message with requests and transactions of its own, on both sides of the SuperLink, and a suffix has some twenty. In a
simulation each stays as it is: there tensors move through shared memory, or the server reads them where a device has
saved them (simulations/runtime/devices.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
from safetensors.numpy import load, save

from lightcl.errors import one_line
from lightcl.exchange.tensors import Arrays, ExchangeError

PACKED = "packed"
"""The name of the only tensor of a message whose tensors are packed; no network has a tensor of this name."""


def packed(arrays: Mapping[str, np.ndarray]) -> Arrays:
    """All tensors in one of bytes, in the format of safetensors; none where there are none."""
    if not arrays:
        return {}
    content = save({name: np.asarray(array, order="C") for name, array in arrays.items()})
    return {PACKED: np.frombuffer(content, dtype=np.uint8)}


def _unpacked(content: np.ndarray) -> Arrays:
    if content.dtype != np.uint8 or content.ndim != 1:
        raise ExchangeError(f"the packed tensors are {content.dtype}{list(content.shape)}, expected bytes")
    try:
        return dict(load(content.tobytes()))
    except Exception as error:  # bytes that were made up; safetensors checks sizes before it reads a tensor
        reason = one_line(f"{type(error).__name__}: {error}", 100)
        raise ExchangeError(f"the packed tensors cannot be decoded ({reason})") from error


class Encoded(Protocol):
    """A tensor as a message carries it (Flower's `Array`)."""

    def numpy(self) -> np.ndarray: ...


def decoded(record: Mapping[str, Encoded]) -> Arrays:
    """The tensors of a message, packed or not. Raises ExchangeError for bytes that are no array."""
    arrays: Arrays = {}
    for name, tensor in record.items():
        try:
            array: object = tensor.numpy()
        except Exception as error:  # NumPy raises many kinds for bytes that were made up, MemoryError among them
            reason = one_line(f"{type(error).__name__}: {error}", 100)
            raise ExchangeError(f"tensor {name!r} cannot be decoded ({reason})") from error
        if not isinstance(array, np.ndarray):  # an archive of arrays
            raise ExchangeError(f"tensor {name!r} cannot be decoded: it is no array")
        arrays[name] = array
    return _unpacked(arrays[PACKED]) if set(arrays) == {PACKED} else arrays
