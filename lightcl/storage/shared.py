"""Tensors that many states have in common, kept once on disk: one file per version, which the states link to.

A hard link costs no space, and the file system frees the file when the last state that needs it is gone: no one has to
count references.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


class SharedVersions:
    """The versions of shared tensors in one folder; many processes may use it at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def file(self, version: int, tensors: Mapping[str, Tensor]) -> Path:
        """The file of a version, which the first caller writes. Older files that no state links to are removed.

        Whether the file holds the given tensors is for `StateFolder.save` to compare. Raises OSError where the disk
        refuses it.
        """
        path = self.folder / f"version-{version}.safetensors"
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary = self.folder / f".{path.name}.{os.getpid()}.partial"
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary)
            temporary.replace(path)
            for old in self.folder.glob("version-*.safetensors"):
                if old != path and old.stat().st_nlink == 1:
                    old.unlink(missing_ok=True)
        return path
