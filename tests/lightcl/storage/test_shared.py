"""Tensors that states have in common are on disk once, and never mistaken for a state's own."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from lightcl.storage import files
from lightcl.storage.files import checksum
from lightcl.storage.shared import SharedVersions
from lightcl.storage.state import StateFolder, Stored


def load(folder: Path) -> Stored:
    stored = StateFolder(folder).load()
    assert stored is not None
    return stored


def saved(tmp_path: Path) -> tuple[StateFolder, Path, dict[str, torch.Tensor]]:
    """A state that shares `a` of version 1, and has a `b` and a head of its own."""
    common = {"a": torch.arange(1000.0), "b": torch.ones(2)}
    file = SharedVersions(tmp_path / "shared").file(1, common)
    state = StateFolder(tmp_path / "d", durable=False)
    tensors = {"a": common["a"], "b": torch.zeros(2), "head": torch.ones(1)}
    state.save(tensors, {"n": 1}, shared=file)
    return state, file, tensors


def test_equal_tensors_are_referred_to_and_others_are_the_states_own(tmp_path: Path) -> None:
    state, _, tensors = saved(tmp_path)
    state.save(None, {"n": 2})
    own = next((tmp_path / "d").glob("*.safetensors"))
    assert own.stat().st_size < 1000
    stored = load(tmp_path / "d")
    assert stored.values == {"n": 2}
    assert stored.lost is None
    assert stored.tensors.keys() == tensors.keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in stored.tensors.items())


def test_a_state_without_shared_tensors_does_not_need_the_file(tmp_path: Path) -> None:
    state, file, tensors = saved(tmp_path)
    state.save(tensors, {"n": 3})
    file.unlink()
    stored = load(tmp_path / "d")
    assert stored.lost is None
    assert torch.equal(stored.tensors["a"], tensors["a"])


def test_run_folders_may_move(tmp_path: Path) -> None:
    saved(tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    assert load(tmp_path / "there" / "d").lost is None


def test_only_the_newest_version_is_kept_and_a_late_one_does_not_remove_it(tmp_path: Path) -> None:
    versions = SharedVersions(tmp_path / "shared")
    for version in (9, 10, 11):
        versions.file(version, {"a": torch.full((2,), float(version))})
        assert [f.name for f in versions.folder.iterdir()] == [f"version-{version}.safetensors"]
    versions.file(8, {"a": torch.zeros(2)})
    assert (versions.folder / "version-11.safetensors").exists()


@pytest.mark.parametrize("damaged", [False, True], ids=["gone", "damaged"])
def test_lost_shared_tensors_are_told_and_the_own_ones_are_there(tmp_path: Path, damaged: bool) -> None:
    _, file, tensors = saved(tmp_path)
    if damaged:
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    else:
        file.unlink()
    stored = load(tmp_path / "d")
    assert stored.lost is not None
    assert stored.lost.resolve() == file
    assert stored.tensors.keys() == {"b", "head"}
    assert torch.equal(stored.tensors["b"], tensors["b"])


def test_a_version_that_the_disk_refuses_leaves_nothing_half_written(tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    (folder / f".version-2.safetensors.{os.getpid()}.partial" / "x").mkdir(parents=True)  # where it would be written
    with pytest.raises((OSError, SafetensorError)):
        SharedVersions(folder).file(2, {"a": torch.zeros(2)})
    assert not (folder / "version-2.safetensors").exists()


def test_a_shared_file_is_checked_once_for_all_states_and_again_when_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, file, _ = saved(tmp_path)
    reads: list[Path] = []

    def count(path: Path) -> int:
        reads.append(path)
        return checksum(path)

    monkeypatch.setattr(files, "checksum", count)
    for name in ("e", "f"):
        shutil.copytree(tmp_path / "d", tmp_path / name, dirs_exist_ok=True)
        assert load(tmp_path / name).lost is None
    assert reads == []  # the save has read it
    content = file.read_bytes()
    file.write_bytes(content[:-1] + b"x")
    assert load(tmp_path / "d").lost is not None
    assert reads == [file]
