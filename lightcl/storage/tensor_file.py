"""Files of tensors in the format of safetensors, for a simulation, which writes and reads many thousand small ones.

safetensors' own functions take 25 microseconds for each tensor that they write, give tensors in another order each time
(`load`), or leak memory (`load_file`, 64 bytes per tensor in version 0.8). They can read these files, and this module
reads theirs.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U64": torch.uint64, "U32": torch.uint32,
    "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in TYPES.items()}
_ALIGNED = 8  # bytes of the header's length, of which the header is a multiple, so that all tensors are aligned


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> int:
    """Writes contiguous tensors on the CPU; returns the CRC-32 of the file.

    Raises OSError, and ValueError for tensors of other types or that share memory.
    """
    _check(tensors)
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {}
    end = 0
    for name in names:
        tensor = tensors[name]
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNED)
    first = len(text).to_bytes(_ALIGNED, "little") + text
    value = zlib.crc32(first)
    with file.open("wb") as handle:
        handle.write(first)
        for name in names:
            content = tensors[name].detach().reshape(-1).view(torch.uint8).numpy().data
            handle.write(content)
            value = zlib.crc32(content, value)
    return value


def read_bytes(file: Path) -> np.ndarray:
    """The content of a file, uint8 `[M]`. Raises OSError.

    It is in memory, since a map of it would kill the process where another one cuts the file short.
    """
    return np.fromfile(file, dtype=np.uint8)


def _check(tensors: Mapping[str, Tensor]) -> None:
    places = sorted((tensor.data_ptr(), name) for name, tensor in tensors.items() if tensor.nbytes)
    for (start, name), (following, other) in pairwise(places):
        if following < start + tensors[name].nbytes:
            raise ValueError(f"the tensors {name} and {other} share memory")
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES:
            raise ValueError(f"the tensor {name} holds {tensor.dtype}, which a file of tensors cannot hold")


def tensors_in(content: np.ndarray) -> dict[str, Tensor]:
    """The tensors of a file with this content, in the order of their names. They are views of it.

    Raises ValueError for any other content.
    """
    with _damage():
        begin = _ALIGNED + int.from_bytes(content[:_ALIGNED].tobytes(), "little")
        header = _entries(content[_ALIGNED:begin].tobytes())
        return {name: _tensor(content[begin:], 0, **entry) for name, entry in header.items()}


def read_tensors(file: Path, names: Collection[str]) -> dict[str, Tensor]:
    """Some tensors of a file. They are views of one piece of memory, from the first to the last one in the file.

    Raises OSError, and ValueError where the file is no such file or has not these tensors.
    """
    with file.open("rb", buffering=0) as handle, _damage():
        length = int.from_bytes(handle.read(_ALIGNED), "little")
        if not 0 < length <= os.fstat(handle.fileno()).st_size:
            raise ValueError(f"the header takes {length} bytes, more than the file has")
        header = _entries(handle.read(length))
        wanted = {name: header[name] for name in names}
        start = min(entry["data_offsets"][0] for entry in wanted.values())
        handle.seek(_ALIGNED + length + start)
        content = np.fromfile(handle, np.uint8, max(entry["data_offsets"][1] for entry in wanted.values()) - start)
        return {name: _tensor(content, start, **entry) for name, entry in wanted.items()}


@contextmanager
def _damage() -> Iterator[None]:
    """Whatever a header that was made up raises is a ValueError."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, RuntimeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _entries(text: bytes) -> dict[str, Any]:
    header = json.loads(text)
    header.pop("__metadata__", None)
    return dict(sorted(header.items()))


def _tensor(content: np.ndarray, begin: int, dtype: str, shape: list[int], data_offsets: list[int]) -> Tensor:
    """A tensor in `content`, which begins at the offset `begin`."""
    start, end = (offset - begin for offset in data_offsets)
    if not 0 <= start <= end <= len(content) or min(shape, default=0) < 0:
        raise ValueError(f"a tensor {shape} takes bytes {start} to {end} of {len(content)}")
    return torch.from_numpy(content[start:end]).view(TYPES[dtype]).view(shape)


class TensorFile:
    """Some tensors of a file, read when they are first asked for. They travel to another process as the file's path."""

    def __init__(self, path: Path, names: Collection[str]) -> None:
        self.path, self.names = path, tuple(names)

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Raises OSError and ValueError as `read_tensors`."""
        return read_tensors(self.path, self.names)

    def __reduce__(self) -> tuple[type[TensorFile], tuple[Path, tuple[str, ...]]]:
        return TensorFile, (self.path, self.names)
