"""The prefix cache: rows survive kills and concurrent writers, damage is found, and the size is bounded."""

from __future__ import annotations

import copy
import errno
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightcl.storage import prefix_cache
from lightcl.storage.prefix_cache import SEGMENT_ROWS, CacheFull, FeatureStore, PrefixCache

SHAPE = (3, 2, 2)
SEGMENT = SEGMENT_ROWS * (8 + 3 * 2 * 2 * 4)
ROOT = Path(__file__).parents[3]


def store_in(
    folder: Path, key: str = "one", limit: int = 100 * SEGMENT, dtype: torch.dtype = torch.float32
) -> FeatureStore:
    return PrefixCache(folder, limit).store(key, SHAPE, dtype, {"network": key})


def features(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_rows_come_back_bit_by_bit_also_in_another_process(tmp_path: Path) -> None:
    rows, values = np.array([3, SEGMENT_ROWS + 1, 0]), features(3)
    store_in(tmp_path).write(rows, values)
    found, present = store_in(tmp_path).read(np.array([0, 7, 3, SEGMENT_ROWS + 1]))
    assert present.tolist() == [True, False, True, True]
    assert torch.equal(found[[0, 2, 3]], values[[2, 0, 1]])
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_a_narrow_type_is_stored_rounded_and_said_so_by_its_type(tmp_path: Path) -> None:
    store, values = store_in(tmp_path, dtype=torch.bfloat16), features(2)
    store.write(np.array([0, 1]), values)
    found, present = store.read(np.array([0, 1]))
    assert present.all()
    assert torch.equal(found, values.to(torch.bfloat16))


def test_a_damaged_row_counts_as_absent_and_can_be_written_again(tmp_path: Path) -> None:
    store_in(tmp_path).write(np.arange(4), features(4))
    file = tmp_path / "one" / "00000.rows"
    content = bytearray(file.read_bytes())
    content[8 * SEGMENT_ROWS + 2 * 48] ^= 1  # one bit of row 2
    file.write_bytes(content)
    store = store_in(tmp_path)
    assert store.read(np.arange(4))[1].tolist() == [True, True, False, True]
    assert [store.present(row) for row in range(5)] == [True] * 4 + [False]  # the damage is seen when a row is read
    store.write(np.array([2]), features(4)[2:3])
    found, present = store.read(np.arange(4))
    assert present.all()
    assert torch.equal(found, features(4))


@pytest.mark.parametrize("content", [b"", b"short"])
def test_a_segment_that_is_cut_short_is_made_again(tmp_path: Path, content: bytes) -> None:
    store_in(tmp_path).write(np.arange(2), features(2))
    (tmp_path / "one" / "00000.rows").write_bytes(content)
    store = store_in(tmp_path)
    assert not store.read(np.arange(2))[1].any()
    store.write(np.arange(2), features(2))
    assert torch.equal(store.read(np.arange(2))[0], features(2))


def test_a_segment_that_is_cut_short_while_it_is_open_is_absent_and_can_be_written(tmp_path: Path) -> None:
    """Under a memory map this would kill the process."""
    store = store_in(tmp_path)
    store.write(np.arange(4), features(4))
    os.truncate(tmp_path / "one" / "00000.rows", 8 * SEGMENT_ROWS + 2 * 48 + 5)
    assert store.read(np.arange(4))[1].tolist() == [True, True, False, False]
    store.write(np.arange(4), features(4))
    found, present = store.read(np.arange(4))
    assert present.all()
    assert torch.equal(found, features(4))
    os.truncate(tmp_path / "one" / "00000.rows", 0)
    assert not store.read(np.arange(4))[1].any()


def test_a_store_keeps_a_bounded_number_of_files_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_cache, "OPEN_SEGMENTS", 3)
    store, rows = store_in(tmp_path), SEGMENT_ROWS * np.arange(8)
    store.write(rows, features(8))
    before = open_files()
    for _ in range(2):
        found, present = store.read(rows)
        assert present.all()
        assert torch.equal(found, features(8))
        assert open_files() <= before
    del store
    assert open_files() == before - 3


def test_all_stores_of_a_cache_together_keep_a_bounded_number_of_files_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run with many views has many stores."""
    monkeypatch.setattr(prefix_cache, "OPEN_SEGMENTS", 4)
    before, cache = open_files(), PrefixCache(tmp_path, 100 * SEGMENT)
    stores = [cache.store(f"view {view}", SHAPE, torch.float32, {}) for view in range(5)]
    for _ in range(2):
        for view, store in enumerate(stores):
            store.write(SEGMENT_ROWS * np.arange(2), features(2, view))
    for view, store in enumerate(stores):
        found, present = store.read(SEGMENT_ROWS * np.arange(2))
        assert present.all()
        assert torch.equal(found, features(2, view))
    assert open_files() == before + 4


def _disk_space_of_deleted_files() -> int:
    """Of the segments that this process has open and that have no name any more."""
    taken = 0
    for handle in list(Path("/proc/self/fd").iterdir()):
        name = str(handle.readlink()) if handle.is_symlink() else ""
        if ".rows" in name and name.endswith("(deleted)"):
            taken += handle.stat().st_blocks * 512
    return taken


def test_deleted_segments_take_no_disk_space_in_the_process_that_deletes_them(tmp_path: Path) -> None:
    before, store = open_files(), store_in(tmp_path, limit=2 * SEGMENT)
    for number in range(8):
        store.write(np.array([number * SEGMENT_ROWS]), features(1))
    assert sum(file.stat().st_size for file in tmp_path.glob("*/*.rows")) == 2 * SEGMENT
    assert _disk_space_of_deleted_files() == 0
    assert open_files() == before + 2


@pytest.mark.parametrize("by", ["the limit", "cache clear"])
def test_a_segment_that_another_process_deletes_takes_no_disk_space_and_is_written_anew(
    tmp_path: Path, by: str
) -> None:
    store, other = store_in(tmp_path), PrefixCache(tmp_path, 2 * SEGMENT)  # no files in common, as two processes
    store.write(np.arange(2), features(2))
    if by == "the limit":
        other.make_room(2 * SEGMENT)
    else:
        other.clear()
    assert not store.read(np.arange(2))[1].any()
    assert not store.present(0)
    assert _disk_space_of_deleted_files() == 0
    store.write(np.array([1]), features(2)[1:])
    found, present = store_in(tmp_path).read(np.arange(2))
    assert present.tolist() == [False, True]
    assert torch.equal(found[1], features(2)[1])


def test_a_segment_that_cannot_be_opened_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as a process with too many open files; the rows are there all the same."""
    store_in(tmp_path).write(np.arange(3), features(3))
    store, opening = store_in(tmp_path), os.open

    def failing(path: Path, *rest: int) -> int:
        if str(path).endswith(".rows"):
            raise OSError(errno.EMFILE, "Too many open files")
        return opening(path, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(prefix_cache.os, "open", failing)
        for use in (
            lambda: store.write(np.array([5]), features(1)),
            lambda: store.read(np.array([0])),
            lambda: store.present(0),
        ):
            with pytest.raises(OSError, match="Too many open files"):
                use()
    found, present = store.read(np.arange(3))
    assert present.all()
    assert torch.equal(found, features(3))


def test_a_file_that_cannot_be_read_any_more_counts_as_absent_and_is_opened_anew(tmp_path: Path) -> None:
    """As ESTALE of a file server; here the descriptor is closed."""
    store = store_in(tmp_path)
    for use in ("read", "present"):
        store.write(np.arange(3), features(3))
        (segment,) = store._cache._segments.values()
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, segment._handle)  # reading it fails with EBADF
        os.close(null)
        if use == "read":
            assert not store.read(np.arange(3))[1].any()
        else:
            assert not store.present(1)
        found, present = store.read(np.arange(3))
        assert present.all()
        assert torch.equal(found, features(3))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_of_a_store_leaves_the_files_of_the_original_open(tmp_path: Path, copied: Callable[[Any], Any]) -> None:
    store = store_in(tmp_path)
    store.write(np.arange(2), features(2))
    again = copied(store)
    assert torch.equal(again.read(np.arange(2))[0], features(2))
    del again
    assert torch.equal(store.read(np.arange(2))[0], features(2))
    copied(store._cache)
    assert torch.equal(store.read(np.arange(2))[0], features(2))


def test_the_least_recently_used_segment_goes_first(tmp_path: Path) -> None:
    cache = PrefixCache(tmp_path, 2 * SEGMENT)
    stores = {key: cache.store(key, SHAPE, torch.float32, {}) for key in ("old", "used", "new")}
    for age, key in ((300, "used"), (200, "old")):
        stores[key].write(np.array([0]), features(1))
        past = time.time() - age
        os.utime(tmp_path / key / "00000.rows", (past, past))
    fresh = PrefixCache(tmp_path, 2 * SEGMENT)
    fresh.store("used", SHAPE, torch.float32, {}).read(np.array([0]))  # makes it the most recently used
    fresh.store("new", SHAPE, torch.float32, {}).write(np.array([0]), features(1))
    assert [info.key for info in fresh.stores() if info.rows] == ["new", "used"]
    assert sum(info.size for info in fresh.stores()) == 2 * SEGMENT


def test_a_limit_below_one_segment_and_a_full_disk_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CacheFull, match="may take only 10"):
        store_in(tmp_path, limit=10).write(np.array([0]), features(1))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(prefix_cache.os, "posix_fallocate", full)
    with pytest.raises(CacheFull, match="No space left on device"):
        store_in(tmp_path).write(np.array([0]), features(1))
    assert not list((tmp_path / "one").glob(".*"))


def test_stores_are_listed_and_cleared(tmp_path: Path) -> None:
    store_in(tmp_path, "a").write(np.arange(3), features(3))
    store_in(tmp_path, "b").write(np.arange(5), features(5))
    cache = PrefixCache(tmp_path, 100 * SEGMENT)
    assert {info.key: (info.rows, info.size, info.about) for info in cache.stores()} == {
        "a": (3, SEGMENT, {"network": "a"}),
        "b": (5, SEGMENT, {"network": "b"}),
    }
    assert cache.clear("a") >= SEGMENT
    assert [info.key for info in cache.stores()] == ["b"]
    cache.clear()
    assert cache.stores() == []


WRITER = """
import sys, numpy as np, torch
from pathlib import Path
from lightcl.storage.prefix_cache import PrefixCache
store = PrefixCache(Path(sys.argv[1]), 10**9).store("one", (3, 2, 2), torch.float32, {})
print("ready", flush=True)
for turn in range(int(sys.argv[2])):
    for row in range(600):
        store.write(np.array([row]), torch.full((1, 3, 2, 2), float(row)))
"""


def _writer(folder: Path, turns: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(folder), str(turns)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )


def test_concurrent_writers_and_one_killed_among_them_leave_only_right_rows(tmp_path: Path) -> None:
    writers = [_writer(tmp_path, 2), _writer(tmp_path, 2), _writer(tmp_path, 10**6)]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    writers[2].kill()
    assert [writer.wait(timeout=60) for writer in writers][:2] == [0, 0]
    for writer in writers:
        assert writer.stdout is not None
        writer.stdout.close()
    found, present = store_in(tmp_path).read(np.arange(600))
    assert present.all()
    assert torch.equal(found[:, 0, 0, 0], torch.arange(600.0))
