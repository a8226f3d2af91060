"""Flower's arrays, decoded once."""

from __future__ import annotations

from functools import cached_property

import numpy as np
from flwr.app import Array


class DecodedArray(Array):
    """An `Array` that many devices read: the same values, and `numpy` decodes them at its first call only.

    All callers get the same array, so none may write to it.
    """

    def __init__(self, array: Array) -> None:
        super().__init__(array.dtype, array.shape, array.stype, array.data)

    @cached_property
    def _values(self) -> np.ndarray:
        return super().numpy()

    def numpy(self) -> np.ndarray:
        return self._values
