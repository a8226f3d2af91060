"""What is done to tensors before they are sent, and undone after they have arrived: both ends in one class.

`server.compression` names the codec. Server and devices use the same one, in both directions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import numpy as np

from lightcl.exchange.tensors import Arrays

Compression = Literal["none", "fp16"]


class Codec:
    """The identity, and the base of other codecs: `restore(compress(arrays))` has the names and shapes of `arrays`."""

    name: ClassVar[Compression] = "none"

    def compress(self, arrays: Mapping[str, np.ndarray]) -> Arrays:
        """The arrays to send; the bytes of a message are counted on these."""
        return dict(arrays)

    def restore(self, arrays: Mapping[str, np.ndarray]) -> Arrays:
        """The arrays to compute with, from those that have arrived. They are checked afterwards, not here."""
        return dict(arrays)


class Fp16(Codec):
    """fp32 tensors as IEEE 754 half precision: half the bytes.

    Error per value x: at most 2^-11 |x| where 2^-14 <= |x| <= 65504, at most 2^-25 below. A tensor with a larger or a
    non-finite value is sent as it is. So are class sums, which are fp64.
    """

    name = "fp16"
    LARGEST = 65504.0

    def compress(self, arrays: Mapping[str, np.ndarray]) -> Arrays:
        return {name: array.astype(np.float16) if self._fits(array) else array for name, array in arrays.items()}

    def restore(self, arrays: Mapping[str, np.ndarray]) -> Arrays:
        return {
            name: array.astype(np.float32) if array.dtype == np.float16 else array for name, array in arrays.items()
        }

    def _fits(self, array: np.ndarray) -> bool:
        return array.dtype == np.float32 and bool((np.abs(array) <= self.LARGEST).all())


CODECS: dict[Compression, type[Codec]] = {codec.name: codec for codec in (Codec, Fp16)}


def codec_named(name: Compression) -> Codec:
    return CODECS[name]()
