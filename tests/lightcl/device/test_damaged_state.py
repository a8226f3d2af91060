"""A device whose state is damaged: it goes back one generation and gives the same numbers, or says what to do."""

from __future__ import annotations

import json
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lightcl.assembly import build_stream
from lightcl.data.tasks import TaskStream
from lightcl.device.device import EdgeDevice, OutOfStep, Position
from lightcl.device.state import DeviceValues
from lightcl.storage.files import checksum
from lightcl.storage.shared import SharedVersions
from lightcl.storage.state import FILES, MANIFEST, PREVIOUS, Damaged, StateError
from tests.lightcl import toys
from tests.lightcl.device.test_device import everything
from tests.lightcl.storage.test_damage import JSON_VALUES, flip, newest

SUFFIX: dict[str, Any] = {"server": {"aggregation": "suffix"}}


def trained(folder: Path, **sections: Any) -> EdgeDevice:
    """After both tasks, tested after the first only."""
    device = toys.device(folder, **sections)
    device.train(0, 2)
    device.evaluate()
    device.train(1, 2)
    return device


@pytest.mark.parametrize(
    "damage",
    [lambda f: flip(newest(f)), lambda f: (f / MANIFEST).write_text("null"), lambda f: (f / MANIFEST).unlink()],
)
def test_a_device_goes_back_one_training_and_learns_it_again_with_the_same_numbers(tmp_path: Path, damage: Any) -> None:
    before = everything(trained(tmp_path))
    damage(tmp_path)
    with pytest.warns(RuntimeWarning, match="the one before it is used"):
        device = toys.device(tmp_path)
    assert device.position == Position(0, 2)
    assert len(device.rows["til"]) == 1
    with pytest.raises(OutOfStep, match="is at epoch 2 of task 0, not at epoch 2 of task 1"):
        device.check_at(1, 2)
    device.train(1, 2)
    toys.assert_same(everything(device), before)


BAD_VALUES: dict[str, dict[str, Any]] = {
    "task 99": {"position": {"task": 99, "epochs": 1}},
    "a negative task": {"position": {"task": -1, "epochs": 1}},
    "too many epochs": {"position": {"task": 1, "epochs": 3}},
    "a position without epochs": {"position": {"task": 1}},
    "a position of texts": {"position": {"task": "x", "epochs": 1}},
    "no position": {"position": None},
    "a list as position": {"position": [1, 2]},
    "a report of task 99": {"report": {"task": 99}},
    "a report that is a number": {"report": 3},
    "a negative version": {"version": -1},
    "a version that is a text": {"version": "new"},
    "rows that are null": {"rows": None},
    "rows of one setting": {"rows": {"til": {}}},
    "a row of task 99": {"rows": {"til": {"99": [0.5]}, "cil": {}}},
    "a row that is too short": {"rows": {"til": {"1": [0.5]}, "cil": {}}},
    "a row of texts": {"rows": {"til": {"0": ["x"]}, "cil": {}}},
    "an optimizer that is a list": {"optimizer": []},
    "a digest that is a number": {"prefix": 7},
    "a key too many": {"another": 1},
}


@pytest.mark.parametrize("changes", BAD_VALUES.values(), ids=BAD_VALUES.keys())
def test_values_that_no_device_can_have_are_damage(tmp_path: Path, changes: dict[str, Any]) -> None:
    """They are signed, so only their meaning gives them away."""
    trained(tmp_path)
    toys.edit_manifest_(tmp_path, **changes)
    with pytest.warns(RuntimeWarning, match="cannot be read"):
        assert toys.device(tmp_path).position == Position(0, 2)
    toys.edit_manifest_(tmp_path, PREVIOUS, **changes)
    with pytest.raises(StateError, match=r"cannot be read .*; and state\.previous\.json: .* remove the folder"):
        toys.device(tmp_path)


@pytest.mark.parametrize("key", [f.name for f in fields(DeviceValues) if f.default is MISSING])
def test_a_missing_key_is_damage(tmp_path: Path, key: str) -> None:
    trained(tmp_path)
    values = json.loads((tmp_path / MANIFEST).read_text())
    del values[key]
    (tmp_path / MANIFEST).write_text(json.dumps(values))
    toys.edit_manifest_(tmp_path)
    with pytest.warns(RuntimeWarning, match=rf"\({key}: Field required"):
        toys.device(tmp_path)


@pytest.mark.parametrize(
    "name", ["network/fc.weight", "method/vital/layer4.0.conv1", "optimizer/fc.weight/momentum_buffer"]
)
@pytest.mark.parametrize("how", ["missing", "another shape", "another name"])
def test_tensors_that_do_not_fit_are_one_error(tmp_path: Path, name: str, how: str) -> None:
    device = toys.device(tmp_path, training={"epochs": 2, "momentum": 0.9})
    device.train(0, 2)
    device.train(1, 1)
    file = newest(tmp_path)
    tensors = load_file(file)
    name = name if name in tensors else next(n for n in tensors if n.startswith(name.partition("/")[0]))
    tensor = tensors.pop(name)
    if how != "missing":
        tensors["another" if how == "another name" else name] = torch.zeros(1, 2, 3, dtype=tensor.dtype)
    save_file(tensors, file)
    toys.edit_manifest_(tmp_path, **{FILES: {"own": {"name": file.name, "checksum": checksum(file)}}})
    (tmp_path / PREVIOUS).write_text("null")
    try:
        toys.device(tmp_path, training={"epochs": 2, "momentum": 0.9})
    except StateError as error:
        assert "remove" in str(error)  # noqa: PT017 some of these a method does not read before it trains
    else:
        assert not name.startswith("network/")


def test_the_momentum_of_a_finished_task_is_not_kept(tmp_path: Path) -> None:
    """The next task begins with an optimizer of its own."""
    device = toys.device(tmp_path, training={"epochs": 2, "momentum": 0.9})
    device.train(0, 1)
    assert any(name.startswith("optimizer/") for name in load_file(newest(tmp_path)))
    device.train(0, 2)
    assert not any(name.startswith("optimizer/") for name in load_file(newest(tmp_path)))


# -- shared tensors --------------------------------------------------------------------------------------------------


def with_shared(folder: Path, number: int = 0) -> EdgeDevice:
    """A device of a simulation."""
    held = toys.source(size=16)
    return EdgeDevice(
        toys.scenario(**SUFFIX), number, folder / f"d{number}", source=held, share=toys.whole(held), durable=False,
        shared=SharedVersions(folder / "shared"),
    )  # fmt: skip


def test_an_idle_device_whose_version_is_gone_takes_the_newest_and_gives_the_same_numbers(tmp_path: Path) -> None:
    def run(folder: Path, lose: bool) -> EdgeDevice:
        device, other = with_shared(folder), with_shared(folder, 1)
        device.train(0, 2)
        other.train(0, 2)
        first = other.outgoing()
        device.receive(first, 1)
        device.save_received()
        second = {name: array + 0.01 for name, array in first.items()}
        other.receive(second, 2)
        other.save_received()
        assert [f.name for f in (folder / "shared").glob("version-*")] == ["version-2.safetensors"]
        if lose:
            device = with_shared(folder)
            assert device.version == 0
            assert device.position == Position(0, 2)
            for work in (lambda: device.train(1, 2), lambda: device.train(0, 2), device.evaluate):
                with pytest.raises(OutOfStep, match=r"refers to version-1\.safetensors, which is missing or damaged"):
                    work()
        assert device.may_receive(1, 2)
        device.receive(second, 2)
        device.check_version(2)
        device.train(1, 2)
        return device

    toys.assert_same(everything(run(tmp_path / "a", True)), everything(run(tmp_path / "b", False)))


def test_a_device_with_older_tensors_than_the_server_believes_says_so(tmp_path: Path) -> None:
    device = toys.device(tmp_path, **SUFFIX)
    device.train(0, 2)
    device.receive(device.outgoing(), 3)
    device.save_received()
    flip(newest(tmp_path))
    with pytest.warns(RuntimeWarning):
        device = toys.device(tmp_path, **SUFFIX)
    assert (device.position, device.version) == (Position(0, 2), 0)
    with pytest.raises(OutOfStep, match="has version 0 of the shared tensors, the request is for version 3"):
        device.check_version(3)


@pytest.mark.parametrize("damaged", [False, True], ids=["gone", "damaged"])
def test_a_device_writes_the_start_of_its_head_again(tmp_path: Path, damaged: bool) -> None:
    device = with_shared(tmp_path)
    device.train(0, 2)
    device.receive(device.outgoing(), 1)
    device.save_received()
    assert "difference/network/fc.weight" in load_file(newest(tmp_path / "d0"))
    start = next((tmp_path / "shared").glob("start-*"))
    if damaged:
        flip(start)
    else:
        start.unlink()
    toys.assert_same(everything(with_shared(tmp_path)), everything(device))


def test_a_version_file_that_cannot_be_written_costs_only_disk(tmp_path: Path) -> None:
    (tmp_path / "shared").write_text("a file")
    device = with_shared(tmp_path)
    device.train(0, 2)
    device.receive(device.outgoing(), 1)
    device.save_received()
    again = with_shared(tmp_path)
    assert again.version == 1
    toys.assert_same(everything(again), everything(device))


# -- hundreds of values ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stream() -> TaskStream:
    held = toys.source(size=16)
    return build_stream(toys.scenario(), held, toys.whole(held), 0)


@settings(max_examples=300, deadline=None, database=None, derandomize=True)
@given(key=st.sampled_from([*DeviceValues.__dataclass_fields__, "another"]), value=JSON_VALUES, deep=st.booleans())
def test_any_values_are_a_device_or_damage(key: str, value: Any, deep: bool, stream: TaskStream) -> None:
    position = {"task": 1, "epochs": 2}
    values: dict[str, Any] = {
        "device": 0, "scenario": "s", "prefix": "p", "channels": "c", "accelerator": "cpu", "position": position,
        "version": 3, "report": None, "rows": {"til": {"0": [0.5]}, "cil": {}},
        "optimizer": {"state": {}, "groups": []},
    }  # fmt: skip
    if deep and isinstance(values.get(key), dict):
        first = next(iter(values[key]))
        values[key] = {**values[key], first: value}
    else:
        values[key] = value
    try:
        found = DeviceValues.of(json.loads(json.dumps(values)))
        found.check(stream, 2)
    except Damaged:
        return
    assert found.position.task in stream.ids
    assert all(task in stream.ids for rows in found.rows.values() for task in rows)
    assert json.loads(json.dumps(found.to_json()))
