"""What the devices of a simulation send: the server reads their tensors where they have saved them."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

import client.app
from lightcl.exchange.messages import ARRAYS, INSTRUCTION, Instruction
from lightcl.exchange.wire import decoded
from lightcl.records.folder import RunFolder
from server.arrays import PlainArray, SavedArray
from server.rounds import Coordinator
from simulations.runtime.devices import make_app, make_local_app
from tests.inprocess import InProcessGrid, Silent, rows_of_a_run, small

SCENARIOS: dict[str, dict[str, Any]] = {
    "suffix": {"server": {"aggregation": "suffix"}},
    "suffix and head": {"server": {"aggregation": "suffix+head"}},
    "a part of the epochs": {"server": {"aggregation": "suffix", "rounds_per_task": 2}},
    "half precision": {"server": {"aggregation": "suffix", "compression": "fp16"}},
    "sums alone": {"server": {"aggregation": "none"}, "method": {"name": "lightcl-plus", "share_statistics": True}},
    "nothing": {"server": {"aggregation": "none"}},
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_numbers_are_those_of_tensors_that_travel(tmp_path: Path, name: str) -> None:
    scenario = small(**SCENARIOS[name])
    assert rows_of_a_run(tmp_path / "a", scenario, make_local_app) == rows_of_a_run(tmp_path / "b", scenario, make_app)


def trained(grid: InProcessGrid, until_epoch: int = 2) -> ArrayRecord:
    scenario = small(server={"aggregation": "suffix"}, training={"momentum": 0.9}).model_dump_json()
    record = ConfigRecord(Instruction(0, "run", scenario, 1, 0, until_epoch, 0).to_record())
    message = Message(RecordDict({INSTRUCTION: record}), dst_node_id=100, message_type="train")
    (reply,) = grid.pull_messages(grid.push_messages([message]))
    found: ArrayRecord = pickle.loads(pickle.dumps(reply)).content[ARRAYS]  # noqa: S301 as it travels
    return found


def test_a_reply_names_the_file(tmp_path: Path) -> None:
    local, others = InProcessGrid(tmp_path / "a", 1), InProcessGrid(tmp_path / "b", 1)
    local.app, others.app = make_local_app(tmp_path / "a"), make_app(tmp_path / "b")
    saved, plain = trained(local), trained(others)
    assert all(isinstance(array, SavedArray) for array in saved.values())
    assert all(isinstance(array, PlainArray) for array in plain.values())
    assert len(pickle.dumps(saved)) < len(pickle.dumps(plain)) / 20
    for (name, array), (other, expected) in zip(saved.items(), plain.items(), strict=True):
        assert (name, array.dtype, array.shape) == (other, expected.dtype, expected.shape)
        assert np.array_equal(array.numpy(), expected.numpy())
        assert array.data == expected.data


def test_a_device_that_is_asked_again_after_its_worker_died_sends_the_tensors(tmp_path: Path) -> None:
    grid = InProcessGrid(tmp_path, 1)
    grid.app = make_local_app(tmp_path)
    first = {name: array.tobytes() for name, array in decoded(trained(grid)).items()}
    grid.app = make_local_app(tmp_path)
    client.app._kept.cache_clear()
    again = trained(grid)
    assert all(isinstance(array, PlainArray) for array in again.values()), "nobody knows what is in the file"
    assert {name: array.tobytes() for name, array in decoded(again).items()} == first


def test_a_device_that_is_asked_twice_names_the_file_twice(tmp_path: Path) -> None:
    grid = InProcessGrid(tmp_path, 1)
    grid.app = make_local_app(tmp_path)
    first, again = trained(grid), trained(grid)
    assert all(isinstance(array, SavedArray) for array in again.values())
    assert {n: a.data for n, a in first.items()} == {n: a.data for n, a in again.items()}


def test_the_server_reads_and_keeps_what_is_exchanged_only(tmp_path: Path) -> None:
    grid = InProcessGrid(tmp_path, 1)
    grid.app = make_local_app(tmp_path)
    arrays = decoded(trained(grid, until_epoch=1))  # the file has a momentum of the same size
    pieces = {id(array.base): array.base.nbytes for array in arrays.values()}
    needed = sum(array.nbytes for array in arrays.values())
    assert sum(pieces.values()) < 1.1 * needed
    assert next((tmp_path / "run").glob("*/tensors-*")).stat().st_size > 1.9 * needed
    assert not any(array.flags.writeable for array in arrays.values())


def test_a_reply_whose_file_is_gone_is_refused_and_the_others_go_on(tmp_path: Path) -> None:
    gone: list[Path] = []

    def lose(message: Message, reply: Message) -> Message:
        if message.metadata.message_type == "train" and not gone:
            gone.extend((tmp_path / "s" / "r").glob("device-*/tensors-*"))
            gone[0].unlink()
        return reply

    scenario, listener = small(server={"aggregation": "suffix"}), Silent()
    grid = InProcessGrid(tmp_path / "s", 3, lose)
    grid.app = make_local_app(tmp_path / "s")
    folder = RunFolder(tmp_path / "run")
    folder.begin(scenario, {"run": "r"}, [])
    results = Coordinator(scenario, folder, "r", listener).run(grid)
    assert results.devices_finished == 2
    assert results.dropped.keys() == {0}, "its state is gone as well"
    assert any("No such file or directory" in reason for _, reason in listener.refusals)
