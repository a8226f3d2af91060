"""A device's state after a power cut: the last save that returned, or a newer one that is entire."""

from __future__ import annotations

import shutil
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import torch

from lightcl.storage import files, state
from lightcl.storage.state import StateError, StateFolder
from tests.power_cut import Recorder, Tree, in_memory, put_back, states

__all__ = ["in_memory"]  # a fixture


def save(folder: StateFolder, number: int) -> None:
    """Every third save is of values alone, as after a test."""
    values = {"n": number, "tensors": number - (number % 3 == 0)}
    folder.save(None if number % 3 == 0 else tensors(number), values)


def tensors(number: int) -> dict[str, torch.Tensor]:
    return {"a": torch.full((300,), float(number)), "b": torch.arange(number)}  # three sectors


def found_in(folder: Path) -> int:
    """The number of the save that the folder holds, 0 for none. Raises StateError, and AssertionError for a mixture."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        stored = StateFolder(folder).load()
    if stored is None:
        return 0
    assert stored.tensors.keys() == {"a", "b"}
    for name, tensor in tensors(stored.values["tensors"]).items():
        assert torch.equal(stored.tensors[name], tensor), name
    return int(stored.values["n"])


def recorded(place: Path, *, saves: int, durable: bool = True, begun: int = 0) -> Recorder:
    """Saves in `place`, which holds the save `begun`; each promises its number when it returns."""
    recorder = Recorder(place)
    with recorder.recording():
        folder = StateFolder(place / "run" / "device-00000", durable=durable)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            folder.load()
        for number in range(begun + 1, begun + saves + 1):
            save(folder, number)
            recorder.promise(number)
    return recorder


def worse(promised: int | None, tree: Tree, place: Path) -> str:
    """Why a state of the disk is worse than what was promised; empty where it is not."""
    folder = put_back(tree, place)
    try:
        found = found_in(folder / "run" / "device-00000")
    except (StateError, AssertionError) as error:
        return f"save {promised} was promised: {error}"
    finally:
        shutil.rmtree(folder)
    return "" if found >= (promised or 0) else f"save {promised} was promised, save {found} is there"


def test_thousands_of_power_cuts_cost_nothing_that_was_promised(in_memory: Path) -> None:
    (in_memory / "disk").mkdir()
    found = list(states(recorded(in_memory / "disk", saves=40), Random(0), 100))
    for promised, tree in found:
        assert not worse(promised, tree, in_memory / "after")
    assert len(found) > 900, "different states"


def test_power_cuts_one_after_the_other_cost_nothing_that_was_promised(in_memory: Path) -> None:
    """Each begins from what the one before left, so also from an older generation beside a damaged one."""
    for seed in range(250):
        draw, promised = Random(seed), 0
        tree: Tree = {}
        for life in range(4):
            recorder = recorded(put_back(tree, in_memory / "disk"), saves=draw.randint(1, 3), begun=promised)
            shutil.rmtree(in_memory / "disk")
            disk = recorder.disk()
            disk.promised = promised
            for operation in recorder.operations[: draw.randint(0, len(recorder.operations))]:
                disk.add(operation)
            tree = disk.after_power_cut(draw)
            promised = disk.promised
            assert not worse(promised, tree, in_memory / "after"), (seed, life)
            promised = found_in(put_back(tree, in_memory / "after") / "run" / "device-00000")
            shutil.rmtree(in_memory / "after")


def losses(place: Path, *, durable: bool = True) -> list[str]:
    """What the power cuts cost, each kind of loss once."""
    (place / "disk").mkdir()
    recorder = recorded(place / "disk", saves=4, durable=durable)
    tried = [worse(promised, tree, place / "after") for promised, tree in states(recorder, Random(0), 10)]
    return sorted(set(filter(None, tried)))


def test_the_double_finds_what_a_save_without_syncs_loses(in_memory: Path) -> None:
    """As simulated devices save, which need not survive a power cut."""
    found = losses(in_memory, durable=False)
    assert any(text.endswith("save 0 is there") for text in found), "everything is gone"
    assert any("cannot be read" in text for text in found), "a manifest without its tensors, or torn ones"


@pytest.mark.parametrize("skipped", ["files", "folders", "folders above"])
def test_the_double_finds_each_sync_that_is_missing(
    in_memory: Path, skipped: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if skipped == "folders above":
        monkeypatch.setattr(state, "sync_names_above", lambda folder: None)
    else:
        real = files.sync
        kept: Callable[[Path], bool] = Path.is_dir if skipped == "files" else Path.is_file
        only_some: Callable[[Path], None] = lambda path: real(path) if kept(path) else None  # noqa: E731
        monkeypatch.setattr(files, "sync", only_some)
        monkeypatch.setattr(state, "sync", only_some)
    assert losses(in_memory)


# -- the double itself -----------------------------------------------------------------------------------------------


def trees(recorder: Recorder) -> set[tuple[tuple[str, bytes | None], ...]]:
    """What may be on the disk after the last operation."""
    disk = recorder.disk()
    for operation in recorder.operations:
        disk.add(operation)
    draw = Random(0)
    return {tuple(sorted(disk.after_power_cut(draw).items())) for _ in range(300)}


def test_a_renamed_file_may_be_empty_torn_old_or_new_until_it_is_synced(tmp_path: Path) -> None:
    old, new = b"o" * 600, b"n" * 600
    (tmp_path / "a").write_bytes(old)
    recorder = Recorder(tmp_path)
    with recorder.recording():
        (tmp_path / "b").write_bytes(new)
        (tmp_path / "b").replace(tmp_path / "a")
    contents = {dict(tree).get("a") for tree in trees(recorder)}
    assert {old, new, b"", new[:512], bytes(512) + new[512:]} <= contents
    assert None not in contents, "a rename leaves one of the two files under the name"


def test_what_is_synced_stays_and_the_name_needs_its_folder(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    with recorder.recording():
        (tmp_path / "x").write_bytes(b"1")
        files.sync(tmp_path / "x")
    assert trees(recorder) == {(), (("x", b"1"),)}
    with recorder.recording():
        files.sync(tmp_path)
        (tmp_path / "x").unlink()
        (tmp_path / "in").mkdir()
    assert trees(recorder) == {
        (("x", b"1"),), (), (("in", None), ("x", b"1")), (("in", None),),
    }  # fmt: skip


def test_an_append_leaves_what_was_synced_before_it(tmp_path: Path) -> None:
    (tmp_path / "rows").write_bytes(b"one\n")
    recorder = Recorder(tmp_path)
    with recorder.recording(), (tmp_path / "rows").open("ab") as file:
        file.write(b"two\n")
    found = [dict(tree)["rows"] or b"" for tree in trees(recorder)]
    assert {b"one\n", b"one\ntwo\n", b"one\n\0\0\0\0"} <= set(found)
    assert all(content.startswith(b"one\n") for content in found)


def test_a_file_that_goes_unseen_is_an_error_of_the_test(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"1")
    recorder = Recorder(tmp_path)
    with pytest.raises(AssertionError, match="in a way that is not recorded"), recorder.recording():
        subprocess.run(["rm", str(tmp_path / "x")], check=True)
