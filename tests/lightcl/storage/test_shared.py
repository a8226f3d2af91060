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
from lightcl.storage.state import Start, StateError, StateFolder, Stored


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


def saved_with_start(tmp_path: Path) -> tuple[StateFolder, Path, dict[str, torch.Tensor]]:
    """A state with a head of 200 rows, of which 20 have moved."""
    begun = {"head": torch.randn(200, 160)}
    start = SharedVersions(tmp_path / "shared").start(begun)
    assert start is not None
    tensors = {"head": begun["head"].clone(), "b": torch.zeros(2)}
    tensors["head"][30:50] += 0.001
    state = StateFolder(tmp_path / "d", durable=False)
    state.save(tensors, {"n": 1}, start=start)
    return state, start.file, tensors


def test_a_state_holds_what_differs_from_the_start(tmp_path: Path) -> None:
    state, _, tensors = saved_with_start(tmp_path)
    state.save(None, {"n": 2})
    own = next((tmp_path / "d").glob("*.safetensors"))
    assert own.stat().st_size < 20_000 < 200 * 160 * 4
    stored = load(tmp_path / "d")
    assert stored.values == {"n": 2}
    assert stored.tensors.keys() == tensors.keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in stored.tensors.items())


def test_devices_with_the_same_start_share_one_file_which_later_versions_leave_alone(tmp_path: Path) -> None:
    versions = SharedVersions(tmp_path / "shared")
    first, second = (versions.start({"head": torch.ones(3)}) for _ in range(2))
    other = versions.start({"head": torch.zeros(3)})
    assert first is not None
    assert second is not None
    assert other is not None
    assert first.file == second.file != other.file
    for version in (1, 2):
        versions.file(version, {"a": torch.zeros(2)})
    assert first.file.exists()
    assert versions.start({}) is None


@pytest.mark.parametrize("damaged", [False, True], ids=["gone", "damaged"])
def test_without_its_start_a_state_cannot_be_read_until_the_start_is_written_again(
    tmp_path: Path, damaged: bool
) -> None:
    versions, begun = SharedVersions(tmp_path / "shared"), {"head": torch.randn(200, 160)}
    start = versions.start(begun)
    assert start is not None
    StateFolder(tmp_path / "d", durable=False).save({"head": begun["head"] + 0.001}, {"n": 1}, start=start)
    if damaged:
        content = start.file.read_bytes()
        start.file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
        start.file.unlink()
    with pytest.raises(StateError, match="start-"):
        load(tmp_path / "d")
    assert versions.start(begun) == start
    assert torch.equal(load(tmp_path / "d").tensors["head"], begun["head"] + 0.001)


def test_a_start_that_the_disk_refuses_is_none_and_the_state_is_whole(tmp_path: Path) -> None:
    (tmp_path / "shared").write_text("a file where the folder would be")
    assert SharedVersions(tmp_path / "shared").start({"head": torch.ones(3)}) is None


def test_a_start_that_has_gone_since_is_not_referred_to(tmp_path: Path) -> None:
    state, file, tensors = saved_with_start(tmp_path)
    file.unlink()
    state.save(tensors, {"n": 3}, start=Start(file, 0, {"head": torch.zeros(200, 160)}))
    assert torch.equal(load(tmp_path / "d").tensors["head"], tensors["head"])
