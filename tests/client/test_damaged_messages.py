"""Damaged tensors from the server: the device refuses them and keeps its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from lightcl.exchange.messages import Instruction
from lightcl.exchange.tensors import ExchangeError
from lightcl.exchange.wire import decoded
from tests.client.test_app import ask
from tests.inprocess import InProcessGrid, small


@settings(max_examples=700, deadline=None, database=None, derandomize=True)
@given(
    flips=st.lists(st.tuples(st.integers(0, 300), st.integers(1, 255)), max_size=6),
    cut=st.none() | st.integers(0, 300),
    header=st.none() | st.text(max_size=60),
)
def test_any_bytes_are_an_array_or_one_error(flips: list[tuple[int, int]], cut: int | None, header: str | None) -> None:
    array = Array(np.arange(6, dtype=np.float32).reshape(2, 3))
    data = bytearray(array.data[:cut])
    if header is not None:  # a header of the right length with any text
        data[10:10] = header.encode("latin-1", "replace")
    for position, bits in flips:
        if data:
            data[position % len(data)] ^= bits
    array.data = bytes(data)
    try:
        found = decoded(ArrayRecord({"w": array}))
    except ExchangeError as error:
        assert len(str(error)) < 200  # noqa: PT017 the other outcome is as good
    else:
        assert isinstance(found["w"], np.ndarray)


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,), }",
        "{'descr': '<f8', 'fortran_order': False, 'shape': (10000000000, 10000000000, 10000000000), }",
        "{'descr': '<f8', 'fortran_order': False, 'shape': ((((((1, }",
        "{'descr': '|O', 'fortran_order': False, 'shape': (1,), }",
    ],
    ids=["8 TB", "10^30 elements", "unbalanced", "objects"],
)
def test_a_header_that_promises_too_much_is_a_refusal_and_the_device_keeps_its_tensors(
    tmp_path: Any, header: str
) -> None:
    grid = InProcessGrid(tmp_path, 1)
    scenario = small(server={"aggregation": "suffix"}).model_dump_json()
    ask(grid, "train", scenario=scenario)
    before = ask(grid, "evaluate", scenario=scenario)
    text = header.encode() + b"\n"
    array = Array(np.zeros(1))
    array.data = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(8)
    record = Instruction(0, "run", scenario, 1, 0, 2, 1).to_record()
    content = RecordDict({"instruction": ConfigRecord(record), "arrays": ArrayRecord({"layer4.0.conv1.weight": array})})
    message = Message(content, dst_node_id=100, message_type="evaluate")
    (reply,) = grid.pull_messages(grid.push_messages([message]))
    reason = str(reply.content.config_records["reply"]["reason"])
    assert reason.startswith("ExchangeError: tensor 'layer4.0.conv1.weight' cannot be decoded")
    assert ask(grid, "evaluate", scenario=scenario)["til"] == before["til"]
