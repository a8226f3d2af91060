"""Crash-safe state on disk: safetensors for tensors, a JSON manifest that names them, and the manifest is the commit.

A save writes the tensors under a new name, syncs them, then replaces the manifest atomically. A process killed at any
point leaves either the old state or the new one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightcl.errors import Failure
from lightcl.storage.files import sync, write_atomically

MANIFEST = "state.json"
Value = TypeVar("Value")


class StateError(Failure):
    """A state folder that cannot be read or written; the text names the file."""


class StateFolder:
    """One owner's state: some tensors and a few plain values.

    `durable`: whether a save survives a power cut. Without it a save waits for no disk; it still survives every kill of
    the process, since what is written is the system's by then, but after a power cut the state may be an older one, or
    damaged and then refused.
    """

    def __init__(self, folder: Path, *, durable: bool = True) -> None:
        self.folder, self.durable = folder, durable
        self._stored: str | None = None
        self._shared: str | None = None

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The last saved `(tensors, values)`; None where nothing was ever saved. Raises StateError."""
        manifest = self.folder / MANIFEST
        if not manifest.exists():
            return None
        try:
            values = json.loads(manifest.read_text())
            self._stored, self._shared = values.pop("tensors"), values.pop("shared", None)
            tensors = load_file(self.folder / str(self._stored))
            return (load_file(self.folder / self._shared) | tensors if self._shared else tensors), values
        except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
            raise StateError(f"{manifest}: the saved state cannot be read ({error})") from error

    def save(
        self, tensors: Mapping[str, Tensor] | None, values: Mapping[str, Any], *, shared: Path | None = None
    ) -> None:
        """Replaces the state. `tensors=None` keeps those saved before and writes only the values.

        `shared` is a file of tensors that other states hold too (`SharedVersions`): those of `tensors` that are equal
        to them are not written, and the state links to the file. Raises StateError where the disk refuses it; the state
        is then the old one.
        """
        try:
            self._save(tensors, values, shared)
        except (OSError, safetensors.SafetensorError) as error:
            raise StateError(f"{self.folder}: the state cannot be saved ({error})") from error

    def _save(self, tensors: Mapping[str, Tensor] | None, values: Mapping[str, Any], shared: Path | None) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._stored is None:
            self.load()  # never write over the tensors that the manifest names
        stored, linked = self._stored, self._shared
        if tensors is not None or stored is None:
            number = int(stored.split("-")[1].split(".")[0]) + 1 if stored else 0
            stored = f"tensors-{number}.safetensors"
            plain = {name: tensor.detach().cpu().contiguous() for name, tensor in (tensors or {}).items()}
            common = self._link(shared, plain) if shared else set()
            linked = shared.name if shared and common else None
            save_file({n: t for n, t in plain.items() if n not in common}, self.folder / stored)
            if self.durable:
                sync(self.folder / stored)
        files = {"tensors": stored} | ({"shared": linked} if linked else {})
        write_atomically(self.folder / MANIFEST, json.dumps({**files, **values}), durable=self.durable)
        self._stored, self._shared = stored, linked
        # Older tensors, and what a process left that was killed while it wrote.
        for pattern in ("tensors-*.safetensors", "version-*.safetensors", f".{MANIFEST}.*.partial"):
            for file in self.folder.glob(pattern):
                if file.name not in (stored, linked):
                    file.unlink(missing_ok=True)

    def _link(self, shared: Path, tensors: Mapping[str, Tensor]) -> set[str]:
        """The names of the tensors that need not be written, since the linked file has them; empty without a link.

        None of them may differ, or be missing here: a load takes all that the file holds and the state does not.
        """
        link = self.folder / shared.name
        try:
            if not link.exists():
                os.link(shared, link)
            common = load_file(link)
        except (OSError, safetensors.SafetensorError):  # no hard links here, or another process removed the file
            return set()
        if not common.keys() <= tensors.keys():
            return set()
        return {name for name, tensor in common.items() if torch.equal(tensor, tensors[name])}


def under(tensors: Mapping[str, Value], prefix: str) -> dict[str, Value]:
    """What stands under `prefix`, by the rest of its name; the inverse of `{f"{prefix}{name}": ...}`."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
