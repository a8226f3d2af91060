"""Tensors that states have in common are on disk once, and never mistaken for a state's own."""

from __future__ import annotations

from pathlib import Path

import torch

from lightcl.storage.shared import SharedVersions
from lightcl.storage.state import StateFolder


def test_equal_tensors_are_linked_and_others_are_the_states_own(tmp_path: Path) -> None:
    common = {"a": torch.arange(3.0), "b": torch.ones(2)}
    file = SharedVersions(tmp_path / "shared").file(1, common)
    state = StateFolder(tmp_path / "d", durable=False)
    changed = {"a": common["a"], "b": torch.zeros(2), "head": torch.ones(1)}
    state.save(changed, {"n": 1}, shared=file)
    state.save(None, {"n": 2})
    assert file.stat().st_nlink == 2
    stored = StateFolder(tmp_path / "d").load()
    assert stored is not None
    assert stored[1] == {"n": 2}
    assert stored[0].keys() == changed.keys()
    assert all(torch.equal(tensor, changed[name]) for name, tensor in stored[0].items())
    state.save(changed, {"n": 3})
    assert file.stat().st_nlink == 1, "a state without shared tensors lets the file go"


def test_a_version_is_removed_when_no_state_links_to_it(tmp_path: Path) -> None:
    versions = SharedVersions(tmp_path / "shared")
    state = StateFolder(tmp_path / "d", durable=False)
    for version in (1, 2, 3):
        tensors = {"a": torch.full((2,), float(version))}
        state.save(tensors, {}, shared=versions.file(version, tensors))
    versions.file(4, {"a": torch.zeros(2)})
    assert {f.name for f in versions.folder.iterdir()} == {"version-3.safetensors", "version-4.safetensors"}
