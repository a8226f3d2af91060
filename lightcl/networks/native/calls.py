"""Calls of the C functions on tensors."""

from __future__ import annotations

import ctypes
from enum import IntEnum
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

Argument = Tensor | int | float | None


class Pass(IntEnum):
    """Of a convolution: forward, or backward without or with the gradient of its input."""

    FORWARD, OF_WEIGHTS, OF_MAPS = 0, 1, 2


CHUNK = 32
"""norm.c's rows of a chunk."""
_P = ctypes.c_void_p
_SIGNATURES: dict[str, list[Any]] = {
    "winograd_scratch": [_P, ctypes.c_int, ctypes.c_int],
    "winograd_forward": [_P, ctypes.c_int, ctypes.c_int, *[_P] * 7],
    "winograd_backward": [_P, ctypes.c_int, *[_P] * 6],
    "norm_forward": [_P, ctypes.c_int, ctypes.c_float, ctypes.c_float, *[_P] * 9],
    "norm_backward": [_P, ctypes.c_int, *[_P] * 10],
    "drift_forward": [_P, ctypes.c_int, *[_P] * 5],
    "drift_backward": [_P, ctypes.c_int, *[_P] * 4],
}
"""The parameters of the functions: sizes, and the number of threads, come first."""


def declare(code: ctypes.CDLL) -> None:
    """Tells ctypes what the functions of a library take. Raises OSError where one is missing."""
    try:
        code.winograd_scratch.restype = ctypes.c_long
        for name, parameters in _SIGNATURES.items():
            getattr(code, name).argtypes = parameters
    except AttributeError as error:
        raise OSError("it is not made of these sources") from error


def call(code: ctypes.CDLL, function: str, sizes: tuple[int, ...], *arguments: Argument) -> None:
    """Runs a function on `sizes`, PyTorch's number of threads, and contiguous tensors, numbers, and NULL for None."""
    given = [value.data_ptr() if isinstance(value, Tensor) else value for value in arguments]
    getattr(code, function)(_array(sizes), torch.get_num_threads(), *given)


def winograd_scratch(code: ctypes.CDLL, sizes: tuple[int, ...], of: Pass) -> Tensor:
    """What a pass of winograd.c takes while it runs."""
    numbers = code.winograd_scratch(_array(sizes), of, torch.get_num_threads())
    return torch.empty(numbers, dtype=torch.float32)


def norm_scratch(rows: int, split: int, width: int) -> Tensor:
    """The same for norm.c."""
    chunks = -(-split // CHUNK) + -(-(rows - split) // CHUNK)
    return torch.empty(width * (8 + 2 * chunks), dtype=torch.float32)


@lru_cache(1024)
def _array(sizes: tuple[int, ...]) -> ctypes.Array[ctypes.c_long]:
    """Sizes as C reads them; it never writes there."""
    return (ctypes.c_long * len(sizes))(*sizes)
