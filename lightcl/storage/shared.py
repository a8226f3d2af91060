"""Tensors that many states have in common, kept once on disk: one file per version, which the states refer to.

Only the newest version is kept. A state that refers to an older one has lost these tensors (`Stored.lost`), which is
intended: its device is idle, and receives the newest version before it works again. So the disk that a fleet takes does
not grow with the number of rounds.

What a device does not share is close to what all devices had at first: that is kept as well, and a state holds the
difference (`lightcl/storage/difference.py`).
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import safetensors
from safetensors.torch import save, save_file
from torch import Tensor

from lightcl.storage.files import checksum_once
from lightcl.storage.state import Start

PATTERN = "version-*.safetensors"


class SharedVersions:
    """The versions of shared tensors in one folder; many processes may use it at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def file(self, version: int, tensors: Mapping[str, Tensor]) -> Path:
        """The file of a version, which the first caller writes. Files of older versions are removed before.

        Whether the file holds the given tensors is for `StateFolder.save` to compare. Raises OSError or SafetensorError
        where the disk refuses it; nothing of the file is left then.
        """
        path = self.folder / f"version-{version}.safetensors"
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            for old in self.folder.glob(PATTERN):
                if _number(old) < version:  # a late message about an older version must not remove a newer one
                    old.unlink(missing_ok=True)
            with _in_place_of(path) as temporary:
                save_file(_plain(tensors), temporary)
        return path

    def start(self, tensors: Mapping[str, Tensor]) -> Start | None:
        """What a device has at first of the tensors that it does not share, in a file; None where there are none, or
        the disk refuses it.

        The file is named by its content, and written again where it is damaged.
        """
        if not tensors:
            return None
        content = save(_plain(tensors))
        value = zlib.crc32(content)
        path = self.folder / f"start-{value:08x}.safetensors"
        try:
            if not path.exists() or checksum_once(path) != value:
                self.folder.mkdir(parents=True, exist_ok=True)
                with _in_place_of(path) as temporary:
                    temporary.write_bytes(content)
        except OSError:
            return None
        return Start(path, value, dict(tensors))


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


@contextmanager
def _in_place_of(path: Path) -> Iterator[Path]:
    """A file of this process that takes the place of `path`; nothing of it is left where the disk refuses it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield temporary
        temporary.replace(path)
    except (OSError, safetensors.SafetensorError):
        temporary.unlink(missing_ok=True)
        raise


def _number(file: Path) -> int:
    digits = file.stem.removeprefix("version-")
    return int(digits) if digits.isdecimal() else -1
