"""Files of tensors in the format of safetensors, for a simulation, which writes and reads many thousand small ones.

safetensors' own functions take 25 microseconds for each tensor that they write, give tensors in another order each time
(`load`), or leak memory (`load_file`, 64 bytes per tensor in version 0.8). They can read these files, and this module
reads theirs.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in TYPES.items()}
_ALIGNED = 8  # bytes of the header's length, of which the header is a multiple, so that all tensors are aligned


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> int:
    """Writes contiguous tensors on the CPU; returns the CRC-32 of the file. Raises OSError."""
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


def tensors_in(content: np.ndarray) -> dict[str, Tensor]:
    """The tensors of a file with this content, in the order of their names. They are views of it.

    Raises ValueError for any other content.
    """
    try:
        begin = _ALIGNED + int.from_bytes(content[:_ALIGNED].tobytes(), "little")
        header = json.loads(content[_ALIGNED:begin].tobytes())
        header.pop("__metadata__", None)
        return {name: _tensor(content[begin:], **entry) for name, entry in sorted(header.items())}
    except (KeyError, TypeError, AttributeError, RuntimeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _tensor(content: np.ndarray, dtype: str, shape: list[int], data_offsets: list[int]) -> Tensor:
    start, end = data_offsets
    if not 0 <= start <= end <= len(content):
        raise ValueError(f"a tensor takes bytes {start} to {end} of {len(content)}")
    return torch.from_numpy(content[start:end]).view(TYPES[dtype]).view(shape)


class TensorFile:
    """A file that is read when its tensors are first asked for. It travels to another process as its path."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Raises OSError, and ValueError where it is no such file."""
        return tensors_in(read_bytes(self.path))

    def __reduce__(self) -> tuple[type[TensorFile], tuple[Path]]:
        return TensorFile, (self.path,)
