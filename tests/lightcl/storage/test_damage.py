"""Damaged state: found by checksums, answered by the generation before or by one clear error; never a new start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lightcl.storage.files import checksum
from lightcl.storage.state import CHECKSUM, FILES, MANIFEST, PREVIOUS, Damaged, StateError, StateFolder, Stored
from tests.lightcl import toys

ROOT = Path(__file__).parents[3]
VALUES: dict[str, Any] = {"position": {"task": 1, "epochs": 2}, "rows": {"til": {"0": [0.5]}}, "report": None}
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=4,
)


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"a": torch.full((4, 5), value), "counts": torch.tensor([1, 2])}


def two_generations(folder: Path) -> Path:
    state = StateFolder(folder)
    for number in (1, 2):
        state.save(tensors(number), {"n": number, **VALUES})
    return folder


def number_in(folder: Path) -> float:
    stored = StateFolder(folder).load()
    assert stored is not None
    return stored.tensors["a"][0, 0].item()


def flip(file: Path, position: int = -1) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 4
    file.write_bytes(content)


def newest(folder: Path) -> Path:
    name = json.loads((folder / MANIFEST).read_text())[FILES]["own"]["name"]
    return folder / str(name)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a flipped bit in the tensors": lambda folder: flip(newest(folder)),
    "a flipped bit in the tensors' header": lambda folder: flip(newest(folder), 12),
    "truncated tensors": lambda folder: os.truncate(newest(folder), 100),
    "empty tensors": lambda folder: os.truncate(newest(folder), 0),
    "deleted tensors": lambda folder: newest(folder).unlink(),
    "a flipped bit in the manifest": lambda folder: flip(folder / MANIFEST, 10),
    "a deleted manifest": lambda folder: (folder / MANIFEST).unlink(),
    "a truncated manifest": lambda folder: os.truncate(folder / MANIFEST, 60),
    **{
        f"a manifest of {content or 'nothing'}": lambda folder, content=content: (folder / MANIFEST).write_text(content)
        for content in ("", "{", "null", "[]", "{}", "7", '"text"', '{"n": 1}', "[" * 100_000, '{"files": null}')
    },
    "a manifest that is no text": lambda folder: (folder / MANIFEST).write_bytes(b"\xff\xfe\x00"),
    **{
        f"files {files!r}": lambda folder, files=files: toys.edit_manifest_(folder, **{FILES: files})
        for files in (
            None, [], "x", {}, {"own": None}, {"own": 3}, {"own": {}}, {"own": {"name": "x", "checksum": "y"}},
            {"own": {"name": "\0", "checksum": 1}}, {"own": {"name": "\ud800", "checksum": 1}},
            {"own": {"name": "x" * 5000, "checksum": 1}}, {"own": {"name": "..", "checksum": 1}},
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_the_generation_before_the_damaged_one_is_used_with_a_warning(
    tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    damage(two_generations(tmp_path))
    state = StateFolder(tmp_path)
    with pytest.warns(RuntimeWarning, match=r"state\.json: the last saved state cannot be read .* one before it is"):
        stored = state.load()
    assert stored is not None
    assert (stored.tensors["a"][0, 0].item(), stored.values["n"]) == (1, 1)
    # What follows is saved beside the good generation, not over it.
    state.save(tensors(3), {"n": 3, **VALUES})
    assert number_in(tmp_path) == 3
    damage(tmp_path)
    with pytest.warns(RuntimeWarning):
        assert number_in(tmp_path) == 1


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_without_an_older_generation_there_is_one_error_that_says_what_to_do(
    tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    StateFolder(tmp_path, durable=False).save(tensors(1), VALUES)
    damage(tmp_path)
    with pytest.raises(StateError, match=r"state\.json: the saved state cannot be read .* remove the folder"):
        StateFolder(tmp_path).load()
    with pytest.raises(StateError, match="cannot be read"):  # nor is it written over
        StateFolder(tmp_path).save(tensors(2), VALUES)


def test_both_generations_damaged_are_an_error_that_says_why(tmp_path: Path) -> None:
    two_generations(tmp_path)
    for name in (MANIFEST, PREVIOUS):
        (tmp_path / name).write_text("null")
    with pytest.raises(StateError, match=r"no JSON object; and state\.previous\.json: .*no JSON object"):
        StateFolder(tmp_path).load()


def test_a_generation_that_the_owner_refuses_is_damaged_as_well(tmp_path: Path) -> None:
    two_generations(tmp_path)

    def check(stored: Stored) -> None:
        if stored.values["n"] == 2:
            raise Damaged("n is 2")

    with pytest.warns(RuntimeWarning, match="n is 2"):
        stored = StateFolder(tmp_path).load(check)
    assert stored is not None
    assert stored.values["n"] == 1


def test_values_saved_after_a_fall_back_leave_the_older_generation_whole(tmp_path: Path) -> None:
    flip(newest(two_generations(tmp_path)))
    state = StateFolder(tmp_path)
    with pytest.warns(RuntimeWarning):
        state.load()
    state.save(None, {"n": 7})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stored = StateFolder(tmp_path).load()
    assert stored is not None
    assert (stored.tensors["a"][0, 0].item(), stored.values) == (1, {"n": 7})


@pytest.mark.parametrize("kept", [MANIFEST, PREVIOUS, "tensors-1.safetensors"])
def test_what_is_left_of_a_state_is_never_taken_for_a_new_one(tmp_path: Path, kept: str) -> None:
    for file in two_generations(tmp_path).iterdir():
        if file.name != kept:
            file.unlink()
    with pytest.raises(StateError, match="cannot be read"):
        StateFolder(tmp_path).load()


# -- the disk refuses ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("full", [f".{MANIFEST}.PID.partial", f".{PREVIOUS}.PID.partial"])
def test_a_full_disk_leaves_both_generations_and_nothing_half_written(tmp_path: Path, full: str) -> None:
    state = StateFolder(two_generations(tmp_path))
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    (tmp_path / full.replace("PID", str(os.getpid()))).symlink_to("/dev/full")
    with pytest.raises(StateError, match=r"the state cannot be saved \(.*[Nn]o space left on device.*; the one before"):
        state.save(tensors(3), {"n": 3, **VALUES})
    after = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    if full.startswith(f".{MANIFEST}"):  # the older generation was replaced already: by the one that still holds
        assert before.pop(PREVIOUS) != after.pop(PREVIOUS) == before[MANIFEST]
    assert after == before
    assert number_in(tmp_path) == 2
    state.save(tensors(4), {"n": 4, **VALUES})  # there is room again
    assert number_in(tmp_path) == 4


@contextmanager
def nobody() -> Iterator[None]:
    """Without the rights of root, for whom nothing is forbidden."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_a_folder_that_may_not_be_written_or_read_is_a_state_error(tmp_path: Path) -> None:
    folder = two_generations(tmp_path / "d")
    state = StateFolder(folder)
    state.load()
    for file in (tmp_path, folder):
        file.chmod(0o555)
    for parent in tmp_path.parents[:3]:
        parent.chmod(0o755)
    try:
        with nobody(), pytest.raises(StateError, match=r"cannot be saved \(Permission denied|Permission denied"):
            state.save(tensors(3), VALUES)
        newest(folder).chmod(0)
        (folder / PREVIOUS).chmod(0)
        with (
            nobody(),
            pytest.raises(StateError, match=r"Permission denied: tensors-1.* Permission denied: state\.prev"),
        ):
            StateFolder(folder).load()
    finally:
        for file in (tmp_path, folder, newest(folder), folder / PREVIOUS):
            file.chmod(0o755)
    assert number_in(folder) == 2


# -- thousands of damages --------------------------------------------------------------------------------------------

EXAMPLES = settings(max_examples=500, deadline=None, database=None, derandomize=True)
FILE_NAMES = (MANIFEST, PREVIOUS, "tensors-1.safetensors", "tensors-0.safetensors")
"""Of two generations, the newest first."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """A folder with two generations, and the content of its files."""
    folder = two_generations(tmp_path_factory.mktemp("whole"))
    assert {file.name for file in folder.iterdir()} == set(FILE_NAMES)
    return folder, {name: (folder / name).read_bytes() for name in FILE_NAMES}


@contextmanager
def damaged(whole: tuple[Path, dict[str, bytes]], changes: dict[str, bytes | None]) -> Iterator[Path]:
    """The folder with other files for the length of a `with`; None: the file is gone."""
    folder, content = whole
    try:
        for name, data in changes.items():
            (folder / name).unlink() if data is None else (folder / name).write_bytes(data)
        yield folder
    finally:
        for name in changes:
            (folder / name).write_bytes(content[name])


def outcome(folder: Path) -> int | None:
    """The generation that a load gives, None for a StateError; anything else that happens is a failure of the test."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            stored = StateFolder(folder).load()
    except StateError:
        return None
    assert stored is not None, "a new start"
    generation = stored.values["n"]
    assert all(torch.equal(stored.tensors[name], tensor) for name, tensor in tensors(generation).items())
    return int(generation)


@EXAMPLES
@given(
    name=st.sampled_from(FILE_NAMES),
    flips=st.lists(st.tuples(st.integers(0, 10_000), st.integers(1, 255)), min_size=1, max_size=4),
)
def test_any_bytes_that_flip_in_one_file_cost_at_most_a_generation(
    name: str, flips: list[tuple[int, int]], whole: tuple[Path, dict[str, bytes]]
) -> None:
    content = bytearray(whole[1][name])
    for position, bits in flips:
        content[position % len(content)] ^= bits
    with damaged(whole, {name: bytes(content)}) as folder:
        found = outcome(folder)
    newest_is_whole = name in (PREVIOUS, "tensors-0.safetensors") or content == whole[1][name]
    if newest_is_whole:
        assert found == 2
    elif found != 1:  # the same JSON in other letters
        assert name == MANIFEST
        assert json.loads(bytes(content)) == json.loads(whole[1][name])


@EXAMPLES
@given(cuts=st.dictionaries(st.sampled_from(FILE_NAMES), st.none() | st.integers(0, 10_000), min_size=1))
def test_files_cut_short_or_gone_give_a_generation_or_one_error(
    cuts: dict[str, int | None], whole: tuple[Path, dict[str, bytes]]
) -> None:
    content = whole[1]
    changes = {name: None if cut is None else content[name][: cut % len(content[name])] for name, cut in cuts.items()}
    expected = None
    for generation, names in ((1, FILE_NAMES[1::2]), (2, FILE_NAMES[0::2])):
        if not any(name in changes for name in names):
            expected = generation
    with damaged(whole, changes) as folder:
        if set(changes) == set(FILE_NAMES) and not any(changes.values()) and None in changes.values():
            everything_gone = all(data is None for data in changes.values())
            assert (StateFolder(folder).load() is None) if everything_gone else outcome(folder) is None
        else:
            assert outcome(folder) == expected


@EXAMPLES
@given(
    key=st.sampled_from([*VALUES, FILES, CHECKSUM, "another", "own", "name", "checksum of the file"]),
    value=JSON_VALUES,
    signed=st.booleans(),
)
def test_any_json_in_a_manifest_gives_a_generation(
    key: str, value: Any, signed: bool, whole: tuple[Path, dict[str, bytes]]
) -> None:
    """Also where the manifest is signed: what another version, or a person, wrote."""
    values = json.loads(whole[1][MANIFEST])
    if key in ("name", "checksum of the file"):
        values[FILES]["own"][key.split()[0]] = value
    elif key == "own":
        values[FILES] = {"own": value}
    else:
        values[key] = value
    with damaged(whole, {MANIFEST: json.dumps(values).encode()}) as folder:
        if signed:
            toys.edit_manifest_(folder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            assert StateFolder(folder).load() is not None


@EXAMPLES
@given(content=st.binary(max_size=200), header=JSON_VALUES | st.dictionaries(st.text(max_size=5), JSON_VALUES))
def test_any_file_of_tensors_with_the_right_checksum_gives_tensors_or_the_older_ones(
    content: bytes, header: Any, whole: tuple[Path, dict[str, bytes]]
) -> None:
    """As if the checksum had been made of damaged bytes."""
    text = json.dumps(header).encode()
    data = len(text).to_bytes(8, "little") + text + content
    manifest = json.loads(whole[1][MANIFEST])
    manifest[FILES]["own"]["checksum"] = zlib.crc32(data)
    changes = {MANIFEST: json.dumps(manifest).encode(), "tensors-1.safetensors": data}
    with damaged(whole, changes) as folder:
        toys.edit_manifest_(folder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            assert StateFolder(folder).load() is not None


def test_a_checksum_is_that_of_zlib_and_finds_every_flipped_byte(tmp_path: Path) -> None:
    assert checksum(_written(tmp_path / "x", b"123456789")) == 0xCBF43926  # the check value of CRC-32
    save_file(tensors(1), tmp_path / "t")
    content = (tmp_path / "t").read_bytes()
    expected = checksum(tmp_path / "t")
    for position in range(len(content)):
        changed = content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]
        assert checksum(_written(tmp_path / "x", changed)) != expected


def _written(file: Path, content: bytes) -> Path:
    file.write_bytes(content)
    return file


# -- killed ----------------------------------------------------------------------------------------------------------

SAVER = """
import sys, torch
from pathlib import Path
from lightcl.storage.state import StateFolder
state = StateFolder(Path(sys.argv[1]))
stored = state.load()
number = stored.values["n"] if stored else 0
while True:
    number += 1
    state.save({"a": torch.full((200, 200), float(number))}, {"n": number})
    state.save(None, {"n": number, "tested": True})
    print(number, flush=True)
"""


def test_sigkill_at_any_moment_of_a_save_leaves_the_last_state_or_the_new_one(tmp_path: Path) -> None:
    for milliseconds in (3, 11, 29):
        with subprocess.Popen(
            [sys.executable, "-W", "error", "-c", SAVER, str(tmp_path)],
            stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error"},
        ) as process:  # fmt: skip
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(milliseconds / 1000)
            process.kill()
            saved = [int(line) for line in process.stdout.read().split()]
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # no older generation
            stored = StateFolder(tmp_path).load()
        assert stored is not None
        assert stored.values["n"] >= max(saved, default=1)
        assert stored.tensors["a"].unique().tolist() == [stored.values["n"]]
