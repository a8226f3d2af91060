"""State on disk: what was saved comes back, and a save that dies leaves the one before."""

import gc
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lightcl.storage import state
from lightcl.storage.files import write_atomically
from lightcl.storage.state import MANIFEST, StateError, StateFolder


class Killed(BaseException):
    """As good as a power failure."""


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"a": torch.full((2, 3), value), "counts": torch.tensor([1, 2]), "mask": torch.tensor([True, False])}


def read(folder) -> tuple[float, dict]:
    stored = StateFolder(folder).load()
    assert stored is not None
    return stored[0]["a"][0, 0].item(), stored[1]


def test_nothing_saved_nothing_loaded(tmp_path):
    assert StateFolder(tmp_path / "new").load() is None


def test_state_survives_the_process(tmp_path):
    StateFolder(tmp_path / "a" / "b").save(tensors(1), {"position": {"task": 2}, "rows": [[0.5]]})
    stored = StateFolder(tmp_path / "a" / "b").load()
    assert stored is not None
    assert stored[1] == {"position": {"task": 2}, "rows": [[0.5]]}
    for name, tensor in tensors(1).items():
        assert torch.equal(stored[0][name], tensor)
        assert stored[0][name].dtype == tensor.dtype


def test_tensors_of_any_memory_layout_and_with_gradient_are_saved(tmp_path):
    images = torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last)
    parameter = torch.nn.Parameter(torch.rand(3, 2))
    StateFolder(tmp_path).save({"images": images, "turned": parameter.T}, {})
    stored = StateFolder(tmp_path).load()
    assert stored is not None
    assert torch.equal(stored[0]["images"], images)
    assert torch.equal(stored[0]["turned"], parameter.T)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_simulation_that_opens_many_states_takes_no_memory_for_it(tmp_path):
    """A way to read files leaked 64 bytes per tensor: 100 MB in a worker of a run of 26,000 device-rounds."""

    def anonymous() -> int:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))

    shared = tmp_path / "shared.safetensors"
    save_file({"common": torch.zeros(4)}, shared)
    own = {f"t{number}": torch.rand(4) for number in range(40)}
    StateFolder(tmp_path / "a", durable=False).save({**own, "common": torch.zeros(4)}, {}, shared=shared)

    def open_often() -> int:
        for _ in range(1000):
            StateFolder(tmp_path / "a", durable=False).load()
        gc.collect()
        return anonymous()

    before = open_often()
    assert (open_often() - before) / 1000 < 800, "bytes for each time that the state was opened"


@pytest.mark.parametrize("durable", [True, False])
def test_tensors_come_back_in_one_order(tmp_path, durable):
    """Sums over them would round differently otherwise."""
    StateFolder(tmp_path, durable=durable).save({f"t{number}": torch.zeros(2) for number in (3, 1, 4, 0, 2)}, {})
    orders = {tuple(StateFolder(tmp_path, durable=durable).load().tensors) for _ in range(10)}
    assert orders == {("t0", "t1", "t2", "t3", "t4")}


@pytest.mark.parametrize(("durable", "files"), [(True, 4), (False, 2)])
def test_each_save_replaces_the_last_and_leaves_two_generations_or_one(tmp_path, durable, files):
    folder = StateFolder(tmp_path, durable=durable)
    for value in range(4):
        folder.save(tensors(value), {"n": value})
    assert read(tmp_path) == (3.0, {"n": 3})
    assert len(list(tmp_path.iterdir())) == files


def test_values_alone_are_saved_beside_the_tensors_saved_before(tmp_path):
    folder = StateFolder(tmp_path)
    folder.save(tensors(1), {"n": 1})
    file = next(tmp_path.glob("*.safetensors"))
    written = file.stat().st_mtime_ns
    folder.save(None, {"n": 2})
    assert read(tmp_path) == (1.0, {"n": 2})
    assert next(tmp_path.glob("*.safetensors")).stat().st_mtime_ns == written


@pytest.mark.parametrize("load_first", [True, False])
def test_values_alone_keep_the_tensors_of_another_process(tmp_path, load_first):
    StateFolder(tmp_path).save(tensors(1), {"n": 1})
    later = StateFolder(tmp_path)
    if load_first:
        later.load()
    later.save(None, {"n": 2})
    assert read(tmp_path) == (1.0, {"n": 2})


@pytest.mark.parametrize("reopened", [False, True])
@pytest.mark.parametrize("saves_before", [1, 2])
def test_death_between_tensors_and_manifest_leaves_the_old_state(tmp_path, monkeypatch, saves_before, reopened):
    folder = StateFolder(tmp_path)
    for value in range(saves_before):
        folder.save(tensors(value), {"n": value})
    if reopened:
        folder = StateFolder(tmp_path)

    def die(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(state, "write_atomically", die)
        with pytest.raises(Killed):
            folder.save(tensors(99), {"n": 99})
    last = saves_before - 1
    assert read(tmp_path) == (last, {"n": last})
    # And life goes on from there.
    restarted = StateFolder(tmp_path)
    restarted.load()
    restarted.save(tensors(5), {"n": 5})
    assert read(tmp_path) == (5.0, {"n": 5})
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_death_before_the_first_manifest_is_as_if_nothing_was_saved(tmp_path, monkeypatch):
    def die(*_: object, **__: object) -> None:
        raise Killed

    monkeypatch.setattr(state, "write_atomically", die)
    with pytest.raises(Killed):
        StateFolder(tmp_path).save(tensors(1), {})
    assert StateFolder(tmp_path).load() is None


def test_death_while_the_tensors_are_written_leaves_the_old_state(tmp_path, monkeypatch):
    folder = StateFolder(tmp_path)
    folder.save(tensors(1), {"n": 1})

    def half(_: object, file) -> None:
        file.write_bytes(b"half a fi")
        raise Killed

    monkeypatch.setattr(state, "save_file", half)
    with pytest.raises(Killed):
        folder.save(tensors(2), {"n": 2})
    assert read(tmp_path) == (1.0, {"n": 1})


def test_death_while_a_text_is_replaced_leaves_the_old_text(tmp_path, monkeypatch):
    file = tmp_path / "text"
    write_atomically(file, "old")

    def die(*_: object, **__: object) -> None:
        raise Killed

    monkeypatch.setattr(Path, "replace", die)
    with pytest.raises(Killed):
        write_atomically(file, "new")
    assert file.read_text() == "old"


def test_text_is_replaced_and_no_partial_file_stays(tmp_path):
    for text in ("long " * 100, "short"):
        write_atomically(tmp_path / "text", text)
        assert (tmp_path / "text").read_text() == text
    assert [p.name for p in tmp_path.iterdir()] == ["text"]


@pytest.mark.parametrize("content", ["", "{", '{"n": 1}', json.dumps({"tensors": "gone.safetensors"})])
def test_unreadable_state_is_an_error_that_names_the_file(tmp_path, content):
    StateFolder(tmp_path).save(tensors(1), {})
    (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(StateError, match=rf"{MANIFEST}: the saved state cannot be read"):
        StateFolder(tmp_path).load()


def test_damaged_tensors_are_an_error(tmp_path):
    StateFolder(tmp_path).save(tensors(1), {})
    file = next(tmp_path.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(StateError, match="cannot be read"):
        StateFolder(tmp_path).load()


@pytest.mark.parametrize("durable", [True, False])
def test_a_save_that_the_disk_refuses_is_a_failure_and_the_state_is_the_old_one(tmp_path, durable):
    (tmp_path / "file").touch()
    with pytest.raises(StateError, match=r"file.a: the state cannot be saved"):
        StateFolder(tmp_path / "file" / "a", durable=durable).save(tensors(1), {})
    folder = StateFolder(tmp_path / "b", durable=durable)
    folder.save(tensors(1), {"round": 1})
    (tmp_path / "b" / "tensors-1.safetensors").mkdir()  # where the next tensors would go
    with pytest.raises(StateError, match="the state cannot be saved"):
        folder.save(tensors(2), {"round": 2})
    assert folder.file_with(["a"]) is None
    assert read(tmp_path / "b") == (1, {"round": 1})
    (tmp_path / "b" / "tensors-1.safetensors").rmdir()
    folder.save(None, {"round": 3})
    assert read(tmp_path / "b") == (1, {"round": 3})
