"""Flower's arrays without encoding: for tensors that stay in this process, or on this machine.

Flower's own hold bytes in NumPy's file format, which whoever sends one of these over a network gets as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy

import numpy as np
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.common.constant import SType

from lightcl.exchange.tensors import Saved


class _Unencoded(Array):
    """An `Array` whose values `numpy` returns, the same at every call, so nobody may write to them.

    `data` encodes them at every call.
    """

    def __init__(self, dtype: str, shape: tuple[int, ...]) -> None:
        self.dtype, self.shape, self.stype = dtype, shape, SType.NUMPY

    @property
    def data(self) -> bytes:  # type: ignore[override]
        return bytes(Array(self.numpy()).data)

    def deflate(self) -> bytes:
        return Array(self.numpy()).deflate()  # the bytes name the class


class PlainArray(_Unencoded):
    """Holds its values."""

    def __init__(self, values: np.ndarray) -> None:
        super().__init__(str(values.dtype), tuple(values.shape))
        self._values = values

    def numpy(self) -> np.ndarray:
        return self._values


class SavedArray(_Unencoded):
    """Its values are in a file until they are asked for: in a simulation a device has saved what it sends.

    `numpy` raises OSError where the file is gone, and ValueError where it is another.
    """

    def __init__(self, saved: Saved) -> None:
        super().__init__("float32", saved.shape)
        self._saved = saved

    def numpy(self) -> np.ndarray:
        values = self._saved.file.tensors[self._saved.name].numpy()
        values.flags.writeable = False
        return values


def plain_record(arrays: Mapping[str, np.ndarray]) -> ArrayRecord:
    """A record of `PlainArray`s."""
    return _record({name: PlainArray(values) for name, values in arrays.items()})


def saved_record(saved: Mapping[str, Saved], others: Mapping[str, np.ndarray]) -> ArrayRecord:
    """A record of tensors in files, and of others with their values."""
    return _record({name: SavedArray(array) for name, array in saved.items()} | dict(plain_record(others)))


def _record(arrays: Mapping[str, Array]) -> ArrayRecord:
    record = ArrayRecord()
    record.update(arrays)  # Flower's constructor would replace them by encoded ones
    return record


def without_arrays(message: Message) -> Message:
    """A copy with the same metadata and records, but no ArrayRecord; the message itself stays as it is."""
    light = copy(message)
    light.content = RecordDict({n: r for n, r in message.content.items() if not isinstance(r, ArrayRecord)})
    return light
