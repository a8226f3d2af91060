"""Calls of the C functions on tensors."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
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
    "winograd_scratch": [_P, ctypes.c_int, ctypes.c_int, ctypes.c_int],
    "winograd_forward": [_P, ctypes.c_int, ctypes.c_int, *[_P] * 7, ctypes.c_long],
    "winograd_backward": [_P, ctypes.c_int, *[_P] * 6, ctypes.c_long],
    "norm_forward": [_P, ctypes.c_int, ctypes.c_float, ctypes.c_float, *[_P] * 9],
    "norm_backward": [_P, ctypes.c_int, *[_P] * 10],
    "drift_forward": [_P, ctypes.c_int, *[_P] * 5],
    "drift_backward": [_P, ctypes.c_int, *[_P] * 4],
    "im2col": [_P, ctypes.c_int, *[_P] * 2],
    "col2im": [_P, ctypes.c_int, *[_P] * 2],
    "transposed": [_P, ctypes.c_int, *[_P] * 2],
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


def winograd_scratch(code: ctypes.CDLL, sizes: tuple[int, ...], of: Pass) -> tuple[Tensor, int]:
    """What a pass of winograd.c takes while it runs, and how many numbers of it each thread has for itself."""
    threads = torch.get_num_threads()
    return _kept.memory(threads, *_scratch_sizes(code, sizes, of, threads))


@lru_cache(1024)
def _scratch_sizes(code: ctypes.CDLL, sizes: tuple[int, ...], of: Pass, threads: int) -> tuple[int, int]:
    own, shared = (code.winograd_scratch(_array(sizes), of, threads, shared) for shared in (0, 1))
    return own, shared


@contextmanager
def kept_scratch(wanted: bool = True) -> Iterator[None]:
    """Inside a `with`, passes of winograd.c that this thread calls use the same scratch memory one after another.

    Where that is not `wanted`, each has its own, and what was kept before is released.

    Each of a pass's threads then finds its part where it was in the pass before, in the cache of its own core. In new
    memory, another thread's part may have been there, and a core fetches what it is about to overwrite from the other
    core's cache: a step of width 20 takes 6 % longer with two threads. With one thread nothing is kept, since it makes
    no difference.
    """
    before = _kept.wanted
    _kept.want(wanted)
    try:
        yield
    finally:
        _kept.want(before)


class _Kept(threading.local):
    """The memory of `kept_scratch`. It grows with the passes that use it."""

    def __init__(self) -> None:
        self.want(False)

    def want(self, wanted: bool) -> None:
        self.wanted = wanted
        if not wanted:
            self._release()

    def _release(self) -> None:
        self._tensor: Tensor | None = None
        self._threads = self._own = self._shared = 0

    def memory(self, threads: int, own: int, shared: int) -> tuple[Tensor, int]:
        """Numbers for `threads` threads, and those of each: `own` or more; and `shared` more, or more, behind them."""
        if not self.wanted or threads == 1:
            return torch.empty(threads * own + shared, dtype=torch.float32), own
        if threads != self._threads:
            self._release()
            self._threads = threads
        if self._tensor is None or own > self._own or shared > self._shared:
            self._tensor = None  # before the new one is there
            self._own, self._shared = max(own, self._own), max(shared, self._shared)
            self._tensor = torch.empty(threads * self._own + self._shared, dtype=torch.float32)
        return self._tensor, self._own


_kept = _Kept()


def norm_scratch(rows: int, split: int, width: int) -> Tensor:
    """The same for norm.c."""
    chunks = -(-split // CHUNK) + -(-(rows - split) // CHUNK)
    return torch.empty(width * (8 + 2 * chunks), dtype=torch.float32)


@lru_cache(1024)
def _array(sizes: tuple[int, ...]) -> ctypes.Array[ctypes.c_long]:
    """Sizes as C reads them; it never writes there."""
    return (ctypes.c_long * len(sizes))(*sizes)
