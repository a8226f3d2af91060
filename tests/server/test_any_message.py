"""Thousands of made-up messages: each is accepted as valid, or refused with one clear error."""

from __future__ import annotations

import json
import threading
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightcl.assembly import build_network
from lightcl.exchange import messages as protocol
from lightcl.exchange.messages import Greeting, Instruction, ProtocolError, Refusal, Tested, Trained
from lightcl.exchange.tensors import ExchangeError
from lightcl.records.rows import DeviceRow, RoundRow
from server.aggregation import Aggregator
from server.ledger import CAUSES, Ledger
from server.mailbox import Mailbox
from server.nodes import Expected, Nodes
from server.replies import ReplyCheck
from tests.inprocess import InProcessGrid, small

SCENARIO = small(server={"aggregation": "suffix"})
QUICK = settings(
    deadline=None, derandomize=True, database=None, max_examples=600,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
SLOW = settings(QUICK, max_examples=150)

WHOLE = st.integers(-(2**63), 2**63 - 1)
SCALARS = [
    WHOLE | st.integers(-1, 5),
    st.floats() | st.floats(0, 1),
    st.text(max_size=12) | st.sampled_from(["", "reason", "\0", "x" * 10_000]),
    st.booleans(),
    st.binary(max_size=8),
]
VALUES = st.one_of(*SCALARS, *(st.lists(scalar, max_size=4) for scalar in SCALARS))
"""What Flower's records can hold."""


def one_clear_error(error: Exception) -> None:
    assert type(error) in (ProtocolError, ExchangeError)
    assert 0 < len(str(error)) < 1000


def mutations(kind: type) -> st.SearchStrategy[dict[str, Any]]:
    """Changes of some fields of a message; None removes the field."""
    names = [field.name for field in fields(kind)]
    return st.dictionaries(st.sampled_from([*names, "reason", "unknown"]), VALUES | st.none(), max_size=3)


def changed(record: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in (record | changes).items() if value is not None}


EXAMPLES: dict[str, Any] = {
    "bool": True, "str": "text", "int": 3, "float": 0.5, "list[float]": [0.5], "list[int]": [1, 2],
}  # fmt: skip


@pytest.mark.parametrize("kind", [Instruction, Greeting, Trained, Tested, Refusal])
@given(data=st.data())
@QUICK
def test_any_record(kind: Any, data: st.DataObject) -> None:
    record = {field.name: EXAMPLES[str(field.type)] for field in fields(kind)}
    given_record = changed(record, data.draw(mutations(kind) | st.dictionaries(st.text(max_size=5), VALUES)))
    try:
        message = kind.from_record(given_record)
    except ProtocolError as error:
        one_clear_error(error)
        return
    assert repr(message.to_record()) == repr({name: given_record[name] for name in record})


@pytest.mark.parametrize("nothing", [None, 3, "text", [], object()])
def test_what_is_no_record(nothing: object) -> None:
    with pytest.raises(ProtocolError):
        Trained.from_record(nothing)


@pytest.fixture(scope="module")
def check(tmp_path_factory: pytest.TempPathFactory) -> ReplyCheck:
    InProcessGrid(tmp_path_factory.mktemp("s"), 1)  # it says who sends, without which there is no message
    network = build_network(SCENARIO, in_channels=1, classes=10)
    aggregator = Aggregator(SCENARIO, SCENARIO.method.build(network), lambda text: None)
    return ReplyCheck(SCENARIO, "prefix", "channels", aggregator)


def reply_of(record: dict[str, Any], arrays: dict[str, Array] | None = None) -> Message:
    sent = Message(RecordDict({}), dst_node_id=100, message_type=MessageType.TRAIN)
    content = RecordDict({protocol.REPLY: ConfigRecord(record)})
    if arrays is not None:
        content[protocol.ARRAYS] = ArrayRecord(arrays)
    return Message(content, reply_to=sent)


def fits_a_row(add: Any) -> None:
    row = DeviceRow(1, 0, "board", 0, 2)
    add(row)
    json.dumps(row.to_json(), allow_nan=False)
    assert DeviceRow.from_json(json.loads(json.dumps(row.to_json()))) == row
    json.dumps(RoundRow.of([row, row], 0, 1.0, 1.0).to_json(), allow_nan=False)


TRAINED = Trained(0, 0, 2, 0, "prefix", "channels", 30, 0.5, 1.0, 100.0).to_record()


@given(changes=mutations(Trained))
@settings(QUICK, max_examples=300)
def test_any_report_of_a_training(check: ReplyCheck, changes: dict[str, Any]) -> None:
    assert check.aggregator is not None
    arrays = {name: Array(array) for name, array in check.aggregator.arrays.items()}
    try:
        accepted = check.training(reply_of(changed(TRAINED, changes), arrays), Ledger(SCENARIO)[0], (0, 2))
    except (ProtocolError, ExchangeError) as error:
        one_clear_error(error)
        return
    fits_a_row(lambda row: row.add_training_(accepted.report))


TESTED = Tested(0, 0, 2, 0, [0], [0.5], [0.5], [9], 1.0).to_record()


@given(changes=mutations(Tested))
@QUICK
def test_any_report_of_a_test(check: ReplyCheck, changes: dict[str, Any]) -> None:
    ledger = Ledger(SCENARIO)
    ledger[0].epochs = 2
    try:
        report = check.test(reply_of(changed(TESTED, changes)), ledger[0])
    except ProtocolError as error:
        one_clear_error(error)
        return
    fits_a_row(lambda row: row.add_test_(report))
    ledger[0].add_test_(report)
    json.dumps(ledger[0].to_saved(), allow_nan=False)


@given(data=st.data())
@SLOW
def test_any_tensors(check: ReplyCheck, data: st.DataObject) -> None:
    """Another type, shape, name or number of bytes; and bytes that are flipped."""
    assert check.aggregator is not None
    arrays = {name: Array(array) for name, array in check.aggregator.arrays.items()}
    name = data.draw(st.sampled_from(sorted(arrays)))
    good = arrays[name].numpy()
    kind = data.draw(st.sampled_from(["dtype", "shape", "value", "name", "bytes", "cut", "stype"]))
    if kind == "dtype":
        arrays[name] = Array(
            good.astype(data.draw(st.sampled_from(["f2", "f8", "i4", "u1", "?", "c8", "U3", "M8[s]"])))
        )
    elif kind == "shape":
        arrays[name] = Array(np.zeros(data.draw(st.lists(st.integers(0, 3), max_size=4)), np.float32))
    elif kind == "value":
        with np.errstate(over="ignore"):
            arrays[name] = Array(np.full(good.shape, data.draw(st.floats()), data.draw(st.sampled_from(["f4", "f8"]))))
    elif kind == "name":
        arrays[data.draw(st.text(max_size=5))] = arrays[name]
    else:
        content = bytearray(arrays[name].data)
        if kind == "bytes":
            for position in data.draw(st.lists(st.integers(0, 127), min_size=1, max_size=4)):
                content[position] ^= data.draw(st.integers(1, 255))
        elif kind == "cut":
            content = content[: data.draw(st.integers(0, len(content) - 1))]
        stype = "numpy.ndarray" if kind != "stype" else data.draw(st.text(max_size=12))
        arrays[name] = Array("float32", good.shape, stype, bytes(content))
    try:
        accepted = check.training(reply_of(TRAINED, arrays), Ledger(SCENARIO)[0], (0, 2))
    except (ProtocolError, ExchangeError) as error:
        one_clear_error(error)
        return
    assert {n: a.shape for n, a in accepted.arrays.items()} == check.aggregator.shapes(finished=True)
    assert all(np.isfinite(array).all() for array in accepted.arrays.values())


@given(st.lists(mutations(Greeting), min_size=2, max_size=2))
@SLOW
def test_any_greeting(tmp_path: Path, changes: list[dict[str, Any]]) -> None:
    """Of two nodes; a third is honest."""

    def spoil(message: Message, reply: Message) -> Message:
        node = message.metadata.dst_node_id - 100
        if node < 2:
            reply.content[protocol.REPLY] = ConfigRecord(changed(dict(reply.content[protocol.REPLY]), changes[node]))
        return reply

    instruction = Instruction(0, "r", SCENARIO.model_dump_json(), 0, 0, 0, 0)
    grid = InProcessGrid(tmp_path, 3, spoil)
    nodes = Nodes(Mailbox(grid, threading.Event()), Expected(3, 2, (4, 100_000)), instruction, 60.0)
    nodes.update()
    hosting = [node for device in range(3) if (node := nodes.node_of(device)) is not None]
    assert len(set(hosting)) + len(nodes.problems) >= 2
    assert all(0 < len(problem) <= 500 for problem in nodes.problems)
    assert all(len(nodes.name_of(device)) <= 100 for device in range(3))
    if nodes.agreed:
        build_network(SCENARIO, in_channels=min(nodes.agreed.channels, 8), classes=min(nodes.agreed.classes, 100))


REFUSALS = st.builds(
    Refusal,
    task=st.integers(-2, 6) | WHOLE,
    epochs=st.integers(-2, 4) | WHOLE,
    version=WHOLE,
    reason=st.sampled_from([*CAUSES, "another"]).map(lambda cause: f"{cause}: said the device") | st.text(max_size=20),
)


@given(st.lists(REFUSALS | st.none(), max_size=60))
@QUICK
def test_any_refusals_end(moves: list[Refusal | None]) -> None:
    """None is a task that the device learns. It gets nowhere by refusing, and falls back once per cause at most."""
    scenario = small(stream={"tasks": 5})
    ledger = Ledger(scenario, [(0, 1, 3, 4)] * 3)
    entry = ledger[0]
    behind = 0
    for move in moves:
        before = (entry.position, entry.epochs)
        if move is None:
            if entry.finished(scenario):
                break
            task, until = entry.goal(scenario)
            entry.add_training_(Trained(0, task, until, 0, "", "", 10, 0.5, 1.0, 1.0))
            tasks = list(entry.tasks[: entry.position + 1])
            entry.add_test_(Tested(0, task, until, 0, tasks, [0.5] * len(tasks), [], [10] * len(tasks), 1.0))
        else:
            ledger.follow_(0, move)
            assert (entry.position, entry.epochs) <= before
            assert all(task <= entry.task for task in entry.rows["til"])
            behind += (entry.position, entry.epochs) < before
        if entry.dropped:
            assert len(entry.dropped) < 600
            break
    assert behind <= len(CAUSES) + 1
