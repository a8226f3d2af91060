"""Crash-safe state on disk: safetensors for tensors, a JSON manifest that names them, and the manifest is the commit.

A save writes the tensors under a new name, syncs them, then replaces the manifest atomically. A process killed at any
point leaves either the old state or the new one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import safetensors
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightcl.errors import Failure
from lightcl.storage.files import sync, write_atomically

MANIFEST = "state.json"
Value = TypeVar("Value")


class StateError(Failure):
    """A state folder that cannot be read; the text names the file."""


class StateFolder:
    """One owner's state: some tensors and a few plain values.

    `durable`: whether a save survives a power cut. Without it a save waits for no disk; it still survives every kill of
    the process, since what is written is the system's by then, but after a power cut the state may be an older one, or
    damaged and then refused.
    """

    def __init__(self, folder: Path, *, durable: bool = True) -> None:
        self.folder, self.durable = folder, durable
        self._stored: str | None = None

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The last saved `(tensors, values)`; None where nothing was ever saved. Raises StateError."""
        manifest = self.folder / MANIFEST
        if not manifest.exists():
            return None
        try:
            values = json.loads(manifest.read_text())
            self._stored = values.pop("tensors")
            return load_file(self.folder / str(self._stored)), values
        except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
            raise StateError(f"{manifest}: the saved state cannot be read ({error})") from error

    def save(self, tensors: Mapping[str, Tensor] | None, values: Mapping[str, Any]) -> None:
        """Replaces the state. `tensors=None` keeps those saved before and writes only the values."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._stored is None:
            self.load()  # never write over the tensors that the manifest names
        if tensors is not None or self._stored is None:
            number = int(self._stored.split("-")[1].split(".")[0]) + 1 if self._stored else 0
            self._stored = f"tensors-{number}.safetensors"
            plain = {name: tensor.detach().cpu().contiguous() for name, tensor in (tensors or {}).items()}
            save_file(plain, self.folder / self._stored)
            if self.durable:
                sync(self.folder / self._stored)
        manifest = json.dumps({"tensors": self._stored, **values})
        write_atomically(self.folder / MANIFEST, manifest, durable=self.durable)
        # Older tensors, and what a process left that was killed while it wrote.
        for file in (*self.folder.glob("tensors-*.safetensors"), *self.folder.glob(f".{MANIFEST}.*.partial")):
            if file.name != self._stored:
                file.unlink(missing_ok=True)


def under(tensors: Mapping[str, Value], prefix: str) -> dict[str, Value]:
    """What stands under `prefix`, by the rest of its name; the inverse of `{f"{prefix}{name}": ...}`."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
