"""Weights as what differs from others, compressed without loss: a layer that has learned little takes little room.

The bits of both are combined by XOR, which leaves zeros where they agree: sign and exponent, and the upper digits of
a weight that has hardly moved. These zeros lie together once the first bytes of all weights come first, then all second
bytes, and so on, and zlib takes them out. What it makes of the others is not worth its time, so it is set to be fast.
"""

from __future__ import annotations

import zlib

import numpy as np
import torch
from torch import Tensor

_LEVEL = 1


def difference(weights: Tensor, start: Tensor) -> Tensor | None:
    """What `weights` differ from `start` in, uint8 `[M]`; None where that is no shorter, or where `start` is of another
    shape, or either is not fp32 on the CPU."""
    if weights.shape != start.shape or weights.dtype != torch.float32 or start.dtype != torch.float32:
        return None
    content = zlib.compress(_planes(weights, start).tobytes(), _LEVEL)
    if len(content) >= weights.nbytes:
        return None
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def restored(content: Tensor, start: Tensor) -> Tensor:
    """The weights of which `difference` has made `content`, to the bit. Raises ValueError for any other content."""
    stream = zlib.decompressobj()
    try:
        found = stream.decompress(content.numpy().tobytes(), start.nbytes + 1)
    except zlib.error as error:
        raise ValueError(f"a difference cannot be decompressed ({error})") from error
    if len(found) != start.nbytes:
        raise ValueError(f"a difference to {start.nbytes} bytes has {len(found)}")
    bits = np.ascontiguousarray(np.frombuffer(found, dtype=np.uint8).reshape(4, -1).T).view(np.uint32).ravel()
    return torch.from_numpy((bits ^ _bits(start)).view(np.float32)).view(start.shape)


def _planes(weights: Tensor, start: Tensor) -> np.ndarray:
    """The XOR of both, `[4, N]`: all first bytes, then all second ones."""
    return np.ascontiguousarray((_bits(weights) ^ _bits(start)).view(np.uint8).reshape(-1, 4).T)


def _bits(weights: Tensor) -> np.ndarray:
    values: np.ndarray = weights.detach().contiguous().numpy().ravel()
    return values.view(np.uint32)
