"""Flower's arrays without encoding: for tensors that stay in this process, or on this machine."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from flwr.app import Array, ArrayRecord
from flwr.common.constant import SType


class PlainArray(Array):
    """An `Array` that holds its values `values` of any shape; Flower's own holds bytes in NumPy's file format.

    `numpy` returns the values themselves, the same at every call, so nobody may write to them. `data` encodes them at
    every call: whoever sends the array over a network gets the bytes that Flower expects.
    """

    def __init__(self, values: np.ndarray) -> None:
        self.dtype, self.shape, self.stype = str(values.dtype), tuple(values.shape), SType.NUMPY
        self._values = values

    @property
    def data(self) -> bytes:  # type: ignore[override]
        return bytes(Array(self._values).data)

    def numpy(self) -> np.ndarray:
        return self._values

    def deflate(self) -> bytes:
        return Array(self._values).deflate()  # the bytes name the class


def plain_record(arrays: Mapping[str, np.ndarray]) -> ArrayRecord:
    """A record of `PlainArray`s; Flower's constructor would replace them by encoded ones."""
    record = ArrayRecord()
    record.update({name: PlainArray(values) for name, values in arrays.items()})
    return record
