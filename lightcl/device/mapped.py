"""Weights of a frozen prefix in a file that is mapped into memory, for a device that trains from the prefix cache.

Such a device needs the prefix for images that the cache does not hold: those of a first pass, and the memory samples of
a task. In between Linux may drop the pages, and reads them again when they are needed. All processes of a machine share
one copy.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from pathlib import Path

import torch
from torch import Tensor, nn

_ALIGNED = 64
_MAPPING = "_mapped_weights"


class MappedWeights:
    """The parameters and buffers of `stage`, which from now on lie in a file of `folder` instead of in memory.

    The values stay what they are, and must not be changed from then on: a changed page would be private to this process
    and lost with `release`. The file is named by its content; a damaged one is written again. Raises OSError where the
    folder cannot be written to; the weights then stay in memory.
    """

    def __init__(self, stage: nn.Module, folder: Path) -> None:
        tensors = [t for t in (*stage.parameters(), *stage.buffers()) if _dense(t)]
        content = bytearray()
        places = []
        for tensor in tensors:
            content += bytes(-len(content) % _ALIGNED)
            places.append(len(content))
            content += _in_memory_order(tensor.detach()).numpy().tobytes()
        file = folder / f"{hashlib.sha256(content).hexdigest()[:20]}.weights"
        if not file.is_file() or file.read_bytes() != content:
            folder.mkdir(parents=True, exist_ok=True)
            temporary = file.with_name(f".{file.name}.{os.getpid()}.partial")
            try:
                temporary.write_bytes(content)
                temporary.replace(file)
            except OSError:
                temporary.unlink(missing_ok=True)  # half a file on a full disk
                raise
        with file.open("rb") as handle:
            self._map = mmap.mmap(handle.fileno(), len(content), mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
        for tensor, place in zip(tensors, places, strict=True):
            flat = torch.frombuffer(self._map, dtype=tensor.dtype, count=tensor.numel(), offset=place)
            tensor.data = flat.as_strided(tensor.shape, tensor.stride())

    @classmethod
    def of(cls, stage: nn.Module, folder: Path) -> MappedWeights:
        """The mapping of this stage; the devices of a simulation's worker share the stage, and so the mapping."""
        first = next(stage.parameters())
        found: MappedWeights | None = getattr(first, _MAPPING, None)
        if found is None:
            found = cls(stage, folder)
            setattr(first, _MAPPING, found)
        return found

    def release(self) -> None:
        """Lets Linux have the pages back; they are read again when the weights are needed."""
        self._map.madvise(mmap.MADV_DONTNEED)


def _dense(tensor: Tensor) -> bool:
    """Whether the tensor fills its memory without gaps, in one of the two orders that networks use."""
    ordered = tensor.is_contiguous() or (tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last))
    return ordered and tensor.numel() > 0 and tensor.device.type == "cpu"


def _in_memory_order(tensor: Tensor) -> Tensor:
    return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())
