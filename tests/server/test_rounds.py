"""The server with real devices in this process: rounds, refusals, resume. The wire has tests of its own (slow)."""

from __future__ import annotations

import gc
import json
import logging
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Error, Message
from flwr.common.constant import ErrorCode
from ray.exceptions import ActorDiedError

from lightcl.assembly import build_network
from lightcl.exchange.tensors import check, outgoing, shared_tensors, size_in_bytes
from lightcl.records.folder import RunFolder
from lightcl.scenario import Scenario
from server.aggregation import Aggregator, Contribution
from server.rounds import Coordinator, RunFailure
from tests.inprocess import InProcessGrid, Silent, small


def start(scenario: Scenario, path: Path, listener: Silent | None = None) -> Coordinator:
    folder = RunFolder(path)
    if not folder.exists:
        folder.begin(scenario, {"run": "r"}, [])
    return Coordinator(scenario, folder, "r", listener or Silent())


def rows(path: Path, name: str = "devices.jsonl") -> list[dict[str, Any]]:
    """Rows without what depends on the clock and the host."""
    return [
        {k: v for k, v in json.loads(line).items() if k not in ("timing", "name")}
        for line in (path / name).read_text().splitlines()
    ]


def test_isolated_devices_send_numbers_only(tmp_path: Path) -> None:
    grid = InProcessGrid(tmp_path / "s", 3)
    results = start(small(), tmp_path / "run").run(grid)
    assert results.devices_finished == 3
    assert results.bytes_up == results.bytes_down == 0
    assert all(not m.content.array_records for m in [*grid.sent, *grid.received])
    assert [(r["round"], r["device"], r["task"], len(r["til"])) for r in rows(tmp_path / "run")] == [
        (t + 1, d, t, t + 1) for t in range(2) for d in range(3)
    ]


@pytest.mark.parametrize("aggregation", ["suffix", "suffix+head"])
def test_only_the_exchange_list_leaves_a_device(tmp_path: Path, aggregation: str) -> None:
    scenario = small(server={"aggregation": aggregation})
    grid = InProcessGrid(tmp_path / "s", 3)
    start(scenario, tmp_path / "run").run(grid)
    network = build_network(scenario, in_channels=1, classes=10)
    allowed = set(shared_tensors(network, scenario.server.aggregation))
    assert not allowed & set(network.prefix.state_dict())
    assert ("fc.weight" in allowed) == (aggregation == "suffix+head")
    trained = [m for m in grid.received if m.metadata.message_type.startswith("train")]
    assert trained
    for message in [*grid.sent, *grid.received]:
        for record in message.content.array_records.values():
            assert set(record) == allowed
    assert all(m.content.array_records for m in trained)
    assert all(not m.content.array_records for m in grid.received if m not in trained)


def test_the_average_is_weighted_by_examples_and_reaches_the_devices(tmp_path: Path) -> None:
    scenario = small(server={"aggregation": "suffix"}, stream={"tasks": 1})
    grid = InProcessGrid(tmp_path / "s", 3)
    coordinator = start(scenario, tmp_path / "run")
    coordinator.run(grid)
    replies = [m for m in grid.received if m.content.array_records]
    weights = np.array([m.content["reply"]["examples"] for m in replies], dtype=float)
    assert len(set(weights)) > 1, "the shares must differ for the weights to show"
    assert coordinator.aggregator is not None
    for name in ("layer4.0.conv1.weight", "layer4.1.bn2.running_var"):
        stacked = np.stack([m.content["arrays"][name].numpy().astype(np.float64) for m in replies])
        expected = np.tensordot(weights / weights.sum(), stacked, axes=1)
        np.testing.assert_allclose(coordinator.aggregator.arrays[name], expected, rtol=1e-5, atol=1e-7)
    sent_down = [m for m in grid.sent if m.metadata.message_type.startswith("evaluate")]
    np.testing.assert_array_equal(
        sent_down[0].content["arrays"]["layer4.0.conv1.weight"].numpy(),
        coordinator.aggregator.arrays["layer4.0.conv1.weight"],
    )


def test_a_fleets_tensors_are_in_memory_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One record for the messages to all devices; of the answers only what waits to be averaged, and only till then."""
    scenario = small(server={"aggregation": "suffix", "rounds_per_task": 2})
    grid, last = InProcessGrid(tmp_path / "s", 3), 2
    replies: list[weakref.ref[Message]] = []
    alive: list[int] = []
    answers: list[Contribution] = []

    def watch(message: Message, reply: Message) -> Message:
        if _is(message, "train", 1, message.content["instruction"]["device"]):
            replies.append(weakref.ref(reply))
            grid.received.clear()
        return reply

    def counted(arrays: Any, shapes: Any) -> None:
        gc.collect()
        alive.append(sum(reply() is not None for reply in replies))
        check(arrays, shapes)

    def update(self: Aggregator, given: list[Contribution], round_number: int, fleet_grid: Any) -> None:
        answers.extend(given)
        return moves(self, given, round_number, fleet_grid)

    grid.tamper, moves = watch, Aggregator.update
    monkeypatch.setattr("server.replies.check", counted)
    monkeypatch.setattr(Aggregator, "update", update)
    start(scenario, tmp_path / "run").run(grid)
    assert alive[last] == 1, "an answer that is decoded is let go before the next one"
    assert len(answers) == 3 * 4
    assert all(answer.reply is not None and not answer.reply.content["arrays"] for answer in answers)
    sent: dict[int, list[ArrayRecord]] = {}
    for message in grid.sent:
        for record in message.content.array_records.values():
            sent.setdefault(message.content["instruction"]["version"], []).append(record)
    assert [len(records) for records in sent.values()] == [3] * 4
    assert all(len({id(record) for record in records}) == 1 for records in sent.values())


def _with_array(reply: Message, name: str, array: np.ndarray | Array) -> Message:
    arrays = dict(reply.content["arrays"].items())
    arrays[name] = array if isinstance(array, Array) else Array(array)
    reply.content["arrays"] = ArrayRecord(arrays)
    return reply


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda r: _with_array(r, "layer4.0.bn1.weight", np.full(32, np.nan, np.float32)), "not finite"),
        (lambda r: _with_array(r, "layer4.0.bn1.weight", np.ones(1, np.float32)), "shape [1], expected [32]"),
        (lambda r: _with_array(r, "conv1.weight", np.ones(1, np.float32)), "'conv1.weight' is not part"),
        (
            lambda r: _with_array(r, "layer4.0.bn1.weight", Array("float32", (32,), "numpy.ndarray", b"no array")),
            "cannot be decoded",
        ),
    ],
)
def test_a_bad_reply_is_refused_by_name_and_the_round_goes_on(tmp_path: Path, spoil: Any, said: str) -> None:
    def tamper(message: Message, reply: Message) -> Message:
        first = message.content["instruction"]["round"] == 1
        if first and message.metadata.message_type == "train" and message.content["instruction"]["device"] == 1:
            return spoil(reply)  # type: ignore[no-any-return]
        return reply

    listener = Silent()
    grid = InProcessGrid(tmp_path / "s", 3, tamper)
    coordinator = start(small(server={"aggregation": "suffix"}), tmp_path / "run", listener)
    results = coordinator.run(grid)
    assert [d for d, _ in listener.refusals] == [1]
    assert said in listener.refusals[0][1]
    assert coordinator.aggregator is not None
    assert all(np.isfinite(a).all() for a in coordinator.aggregator.arrays.values())
    assert results.devices_finished == 3, "the device was asked again and caught up"
    assert [r["device"] for r in rows(tmp_path / "run") if "error" in r] == [1]


def test_a_device_that_always_fails_is_dropped_from_the_run(tmp_path: Path) -> None:
    def tamper(message: Message, reply: Message) -> Message:
        if message.metadata.message_type == "train" and message.content["instruction"]["device"] == 2:
            reply.content["reply"]["loss"] = float("nan")
        return reply

    results = start(small(server={"max_failures": 2}), tmp_path / "run").run(InProcessGrid(tmp_path / "s", 3, tamper))
    assert results.devices_finished == 2
    assert "nan" in results.dropped[2]


def test_a_run_in_which_nobody_finishes_fails(tmp_path: Path) -> None:
    def tamper(message: Message, reply: Message) -> Message | None:
        return None if message.metadata.message_type == "train" else reply

    scenario = small(server={"max_failures": 1, "round_timeout": 0.2})
    with pytest.raises(RunFailure, match=r"no reply within 0\.2 s"):
        start(scenario, tmp_path / "run").run(InProcessGrid(tmp_path / "s", 3, tamper))
    assert not (tmp_path / "run" / "results.json").exists()


@pytest.mark.parametrize("strategy", ["FedAvg", "FedAvgM", "FedAdam"])
@pytest.mark.parametrize("dies_at", ["train", "evaluate"])
def test_a_killed_server_goes_on_with_the_same_numbers(tmp_path: Path, strategy: str, dies_at: str) -> None:
    class Killed(BaseException):
        pass

    options = {"FedAvg": {}, "FedAvgM": {"server_momentum": 0.5}, "FedAdam": {"eta": 0.01}}[strategy]
    scenario = small(
        server={"aggregation": "suffix", "strategy": strategy, "strategy_options": options, "rounds_per_task": 2},
        stream={"tasks": 2},
    )
    whole = start(scenario, tmp_path / "whole").run(InProcessGrid(tmp_path / "s1", 3))

    def kill(message: Message, reply: Message) -> Message:
        told = message.content["instruction"]
        if message.metadata.message_type == dies_at and told["round"] == 4 and told["device"] == 1:
            raise Killed
        return reply

    with pytest.raises(Killed):
        start(scenario, tmp_path / "run").run(InProcessGrid(tmp_path / "s2", 3, kill))
    resumed = start(scenario, tmp_path / "run").run(InProcessGrid(tmp_path / "s2", 3))
    assert resumed.til == whole.til
    assert resumed.cil == whole.cil
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")


def test_a_fraction_of_the_devices_still_brings_all_to_the_end(tmp_path: Path) -> None:
    scenario = small(server={"fraction": 0.34})
    results = start(scenario, tmp_path / "run").run(InProcessGrid(tmp_path / "s", 3))
    assert results.devices_finished == 3
    assert results.rounds == 6
    per_round = [r["devices"] for r in rows(tmp_path / "run", "rounds.jsonl")]
    assert per_round == [1] * 6
    trained = [r["device"] for r in rows(tmp_path / "run")]
    assert sorted(trained[:3]) == [0, 1, 2], "the least advanced devices go first"


def test_one_message_trains_and_tests_where_nothing_is_averaged_in_between(tmp_path: Path) -> None:
    grid = InProcessGrid(tmp_path / "s", 3)
    start(small(), tmp_path / "run").run(grid)
    asked = [(m.metadata.message_type, m.content["instruction"]["evaluate"]) for m in grid.sent]
    assert asked[3:] == [("train", True)] * 3 * 2, "after three greetings, one message per device and task"
    # A task in two rounds is tested after the second only.
    grid = InProcessGrid(tmp_path / "s2", 3)
    start(small(server={"rounds_per_task": 2}), tmp_path / "parts").run(grid)
    asked = [(m.metadata.message_type, m.content["instruction"]["evaluate"]) for m in grid.sent]
    assert asked[3:] == ([("train", False)] * 3 + [("train", True)] * 3) * 2


def test_the_rows_are_those_of_two_messages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start(small(), tmp_path / "one").run(InProcessGrid(tmp_path / "s1", 3))
    monkeypatch.setattr("server.phases.Phases._tests_at_once", lambda self, goal: False)
    grid = InProcessGrid(tmp_path / "s2", 3)
    start(small(), tmp_path / "two").run(grid)
    assert sum(m.metadata.message_type == "evaluate" for m in grid.sent) == 3 * 2
    assert rows(tmp_path / "one") == rows(tmp_path / "two")


def test_fewer_nodes_than_devices_host_several_and_change_no_number(tmp_path: Path) -> None:
    start(small(), tmp_path / "three").run(InProcessGrid(tmp_path / "s1", 3))
    start(small(), tmp_path / "two").run(InProcessGrid(tmp_path / "s2", 2))
    assert rows(tmp_path / "three") == rows(tmp_path / "two")


def test_a_prefix_that_is_not_the_fleets_is_refused(tmp_path: Path) -> None:
    def tamper(message: Message, reply: Message) -> Message:
        if message.metadata.message_type == "train" and message.content["instruction"]["device"] == 0:
            reply.content["reply"]["prefix"] = "0" * 16
        return reply

    results = start(small(server={"max_failures": 1}), tmp_path / "run").run(InProcessGrid(tmp_path / "s", 3, tamper))
    assert "frozen prefix 0000000000000000 is not the fleet's" in results.dropped[0]


def _is(message: Message, kind: str, round_number: int, device: int) -> bool:
    told = message.content["instruction"]
    return message.metadata.message_type == kind and (told.get("round"), told["device"]) == (round_number, device)


def test_what_a_device_learned_survives_a_lost_answer(tmp_path: Path) -> None:
    """Its own tensors arrive with the next answer, not the average that the server made without it."""
    trained: list[np.ndarray] = []

    def lose(message: Message, reply: Message) -> Message | None:
        if message.metadata.message_type == "train" and message.content["instruction"]["device"] == 1:
            trained.append(reply.content["arrays"]["layer4.1.conv2.weight"].numpy())
        return None if _is(message, "train", 1, 1) else reply

    scenario = small(server={"aggregation": "suffix", "round_timeout": 0.3, "fraction": 1.0}, stream={"tasks": 1})
    coordinator = start(scenario, tmp_path / "run")
    grid = InProcessGrid(tmp_path / "s", 3, lose)
    assert coordinator.run(grid).devices_finished == 3
    assert len(trained) == 2
    np.testing.assert_array_equal(trained[0], trained[1])
    second = [m for m in grid.sent if _is(m, "train", 2, 1)]
    assert second[0].content.array_records, "the server had a newer average to offer"


def test_a_device_whose_test_was_lost_is_only_tested_again(tmp_path: Path) -> None:
    def lose(message: Message, reply: Message) -> Message | None:
        return None if _is(message, "evaluate", 1, 1) else reply

    scenario = small(server={"aggregation": "suffix", "round_timeout": 0.3}, stream={"tasks": 1})
    grid = InProcessGrid(tmp_path / "s", 3, lose)
    results = start(scenario, tmp_path / "run").run(grid)
    assert (results.devices_finished, results.rounds) == (3, 2)
    assert [m.metadata.message_type for m in grid.sent if m.content["instruction"].get("round") == 2] == ["evaluate"]


def test_late_messages_change_nothing(tmp_path: Path) -> None:
    """Those of a round that timed out may run long after: older tensors, older goals."""
    scenario = small(server={"aggregation": "suffix"})
    grid = InProcessGrid(tmp_path / "s", 3)
    start(scenario, tmp_path / "run").run(grid)
    files = {f: f.read_bytes() for f in (tmp_path / "s").rglob("*.safetensors")}
    sent = [m for m in grid.sent if m.metadata.message_type != "query"]
    last = {m.content["instruction"]["device"]: m for m in sent if m.metadata.message_type == "evaluate"}
    for message in sent:
        if message is not last[message.content["instruction"]["device"]]:
            reply = grid.app(message, grid.nodes[message.metadata.dst_node_id])
            told = message.content["instruction"]
            if told["task"] == 0:
                assert "OutOfStep" in reply.content["reply"]["reason"]
    assert {f: f.read_bytes() for f in (tmp_path / "s").rglob("*.safetensors")} == files


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("til", ["good"]),
        ("til", []),
        ("cil", [1.5]),
        ("images", [1, 2]),
        ("device", 2),
        ("task", 1),
        ("seconds", "fast"),
    ],
)
@pytest.mark.parametrize("aggregation", ["none", "suffix"])
def test_a_test_that_makes_no_sense_is_refused(tmp_path: Path, aggregation: str, field: str, value: Any) -> None:
    def spoil(message: Message, reply: Message) -> Message:
        if message.content["instruction"].get("round") == 1 and message.content["instruction"]["device"] == 0:
            if "tested" in reply.content:
                reply.content["tested"][field] = value
            elif message.metadata.message_type == "evaluate":
                reply.content["reply"][field] = value
        return reply

    listener = Silent()
    scenario = small(server={"aggregation": aggregation})
    results = start(scenario, tmp_path / "run", listener).run(InProcessGrid(tmp_path / "s", 3, spoil))
    assert [d for d, _ in listener.refusals] == [0]
    assert results.devices_finished == 3


def test_a_board_that_cannot_take_part_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    grid = InProcessGrid(tmp_path / "s", 3)
    grid.nodes[101].node_config["own-data"] = "yes"
    listener = Silent()
    scenario = small(server={"connect_timeout": 0.5})
    results = start(scenario, tmp_path / "run", listener).run(grid)
    assert results.devices_finished == 2
    assert "own-data is 'yes', expected true or false" in listener.refusals[0][1]
    assert "not connected" in results.dropped[1]
    # Resumed with the board mended, it learns what it missed.
    del grid.nodes[101].node_config["own-data"]
    assert start(scenario, tmp_path / "run").run(grid).devices_finished == 3


def test_when_nobody_comes_the_reason_is_kept(tmp_path: Path) -> None:
    grid = InProcessGrid(tmp_path / "s", 3)
    grid.nodes.clear()
    with pytest.raises(RunFailure, match="none of 3 devices is connected"):
        start(small(server={"connect_timeout": 0.3}), tmp_path / "run").run(grid)
    assert "connect_timeout" in json.loads((tmp_path / "run" / "failure.json").read_text())["reason"]


def test_a_run_that_goes_on_has_no_verdict_until_its_new_end(tmp_path: Path) -> None:
    standing: list[bool] = []

    def lost(message: Message, reply: Message) -> Message | None:
        if message.metadata.message_type == "train" and message.content["instruction"]["device"] == 1:
            standing.append((tmp_path / "run" / "results.json").exists())
            return None
        return reply

    scenario = small(server={"max_failures": 1, "round_timeout": 0.2, "connect_timeout": 0.3})
    for _ in range(2):
        results = start(scenario, tmp_path / "run").run(InProcessGrid(tmp_path / "s", 3, lost))
        assert results.dropped.keys() == {1}
    assert standing == [False, False]
    assert not RunFolder(tmp_path / "run").completed
    nobody = InProcessGrid(tmp_path / "s", 3)
    nobody.away = set(nobody.nodes)
    with pytest.raises(RunFailure, match="none of 1 devices is connected"):
        start(scenario, tmp_path / "run").run(nobody)
    assert {f.name for f in (tmp_path / "run").glob("*.json")} == {"run.json", "partition.json", "failure.json"}
    assert start(scenario, tmp_path / "run").run(InProcessGrid(tmp_path / "s", 3)).devices_finished == 3
    assert not (tmp_path / "run" / "failure.json").exists()
    assert RunFolder(tmp_path / "run").completed


@pytest.mark.parametrize("phase", ["train", "evaluate"])
def test_a_dead_worker_ends_the_run_and_costs_no_device_a_failure(tmp_path: Path, phase: str) -> None:
    scenario = small(server={"aggregation": "suffix", "max_failures": 1})
    whole = start(scenario, tmp_path / "whole").run(InProcessGrid(tmp_path / "s1", 3))

    def dying(message: Message, reply: Message) -> Message:
        told = message.content["instruction"]
        if message.metadata.message_type == phase and told["round"] == 2 and told["device"] > 0:
            error = ActorDiedError()
            return Message(Error(ErrorCode.UNKNOWN, f"{type(error)}:<'{error}'>"), reply_to=message)
        return reply

    listener, grid = Silent(), InProcessGrid(tmp_path / "s2", 3, dying)
    grid.simulated = True
    with pytest.raises(RunFailure, match=r"a Ray worker died .*fewer simulation\.workers.*--resume"):
        start(scenario, tmp_path / "run", listener).run(grid)
    assert not listener.refusals
    assert not (tmp_path / "run" / "results.json").exists()
    assert "Ray worker" in json.loads((tmp_path / "run" / "failure.json").read_text())["reason"]
    resumed = start(scenario, tmp_path / "run").run(InProcessGrid(tmp_path / "s2", 3))
    assert resumed.til == whole.til
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")


class Freeing(InProcessGrid):
    """Its busy nodes are done once the server has looked `looks` times since the first of them was busy."""

    looks = 0

    def get_node_ids(self) -> list[int]:
        self.looks -= bool(self.busy)
        if self.looks < 0:
            self.busy.clear()
        return super().get_node_ids()


def test_boards_that_still_train_for_a_killed_server_are_waited_for(tmp_path: Path) -> None:
    grid = Freeing(tmp_path / "s", 3)
    grid.busy, grid.looks = set(grid.nodes), 6
    results = start(small(server={"connect_timeout": 0.3}), tmp_path / "run").run(grid)
    assert results.devices_finished == 3
    assert sum(m.metadata.message_type == "query" for m in grid.sent) == 3


def test_they_are_not_waited_for_longer_than_a_round(tmp_path: Path) -> None:
    grid = InProcessGrid(tmp_path / "s", 3)
    grid.busy = set(grid.nodes)
    with pytest.raises(RunFailure, match="none of 3 devices is connected"):
        start(small(server={"connect_timeout": 0.2, "round_timeout": 0.5}), tmp_path / "run").run(grid)


def test_a_board_that_returns_busy_joins_when_it_is_done_and_holds_nobody_up(tmp_path: Path) -> None:
    grid = Freeing(tmp_path / "s", 3)

    def leave(message: Message, reply: Message) -> Message:
        if _is(message, "train", 1, 2):  # its reply has arrived
            grid.away = {102}
        elif _is(message, "train", 2, 0):
            grid.away, grid.busy, grid.looks = set(), {102}, 6
        return reply

    grid.tamper = leave
    scenario = small(server={"connect_timeout": 0.5}, stream={"tasks": 3}, training={"learning_rate": 0.01})
    results = start(scenario, tmp_path / "run").run(grid)
    assert results.devices_finished == 3
    assert [r["device"] for r in rows(tmp_path / "run") if r["round"] in (2, 3)] == [0, 1, 0, 1]
    assert sum(_is(m, "query", 0, 0) and m.metadata.dst_node_id == 102 for m in grid.sent) == 2


def test_a_board_that_does_not_take_part_is_shown_where_no_device_is_missed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    grid = InProcessGrid(tmp_path / "s", 4)
    for node, number in ((100, 0), (101, 1), (102, 2), (103, 0)):
        grid.nodes[node].node_config.update({"partition-id": number, "num-partitions": 3, "name": f"board-{node}"})
    with caplog.at_level(logging.WARNING, logger="flwr"):
        results = start(small(), tmp_path / "run").run(grid)
    assert results.devices_finished == 3
    assert caplog.messages == ["nodes 'board-100' and 'board-103' both have partition-id 0: one takes part"]


SPARSE_FLEET: dict[str, dict[str, Any]] = {
    "method": {"name": "lightcl-sparse", "memory_size": 5},
    "server": {"aggregation": "suffix", "max_failures": 1},
    "fleet": {"devices": 2, "test_data": "whole"},
}


def test_a_pruned_fleet_shares_its_pruned_suffix(tmp_path: Path) -> None:
    scenario = small(**SPARSE_FLEET)
    grid = InProcessGrid(tmp_path / "s", 2)
    results = start(scenario, tmp_path / "run").run(grid)
    assert results.devices_finished == 2
    assert len({m.content["reply"]["channel_sets"] for m in grid.received if "channel_sets" in m.content["reply"]}) == 1
    arrays = [record for m in [*grid.sent, *grid.received] for record in m.content.array_records.values()]
    assert {tuple(record["layer4.1.conv2.weight"].numpy().shape) for record in arrays} == {(6, 6, 3, 3)}
    whole = build_network(small(), in_channels=1, classes=10)
    messages = 2 * 2  # devices, tasks
    assert 0 < results.bytes_up < 0.1 * messages * size_in_bytes(outgoing(whole, "suffix"))


def test_tensors_of_other_channels_are_refused_and_the_others_averaged(tmp_path: Path) -> None:
    def tamper(message: Message, reply: Message) -> Message:
        if message.metadata.message_type == "train" and message.content["instruction"]["device"] == 1:
            reply.content["reply"]["channel_sets"] = "0" * 16
        return reply

    scenario = small(**SPARSE_FLEET)
    coordinator, grid = start(scenario, tmp_path / "run"), InProcessGrid(tmp_path / "s", 2, tamper)
    results = coordinator.run(grid)
    assert results.dropped.keys() == {1}
    assert results.dropped[1].startswith("device 1 has kept other channels (0000000000000000) than the fleet (")
    last = [m for m in grid.received if m.content.array_records][-1]
    assert coordinator.aggregator is not None
    for name, array in last.content["arrays"].items():
        np.testing.assert_allclose(coordinator.aggregator.arrays[name], array.numpy(), rtol=1e-6)


def test_devices_that_share_nothing_may_keep_other_channels(tmp_path: Path) -> None:
    def tamper(message: Message, reply: Message) -> Message:
        if message.metadata.message_type == "train":
            reply.content["reply"]["channel_sets"] = "0" * 16
        return reply

    scenario = small(**SPARSE_FLEET | {"server": {"aggregation": "none"}, "stream": {"tasks": 1}})
    grid = InProcessGrid(tmp_path / "s", 2, tamper)
    assert start(scenario, tmp_path / "run").run(grid).devices_finished == 2


class Flapping(InProcessGrid):
    """A grid of boards on which device 1 is lost in the training of round 1, for as many looks at the fleet."""

    def __init__(self, state: Path, looks: float) -> None:
        super().__init__(state, 3)
        self.looks, self.lost = looks, False

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        messages = list(messages)
        if not self.lost and any(m.metadata.message_type == "train" for m in messages):
            self.lost, self.away = True, {101}
        return super().push_messages(messages)

    def get_node_ids(self) -> list[int]:
        if self.away:
            self.looks -= 1
            if self.looks < 0:
                self.away = set()
        return super().get_node_ids()


def test_a_round_waits_for_a_board_that_is_lost_in_it_and_has_the_same_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.dispatch.AGAIN_SECONDS", 0.01)
    scenario = small(server={"aggregation": "suffix", "reconnect_timeout": 60})
    start(scenario, tmp_path / "undisturbed").run(InProcessGrid(tmp_path / "s", 3))
    listener = Silent()
    start(scenario, tmp_path / "run", listener).run(Flapping(tmp_path / "t", looks=4))
    assert listener.refusals == []
    assert ["device 1 is lost" in text for text in listener.warnings] == [True]

    def numbers(folder: Path) -> list[dict[str, Any]]:
        lines = (folder / "devices.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if k not in ("timing", "bytes_down")} for line in lines]

    assert numbers(tmp_path / "run") == numbers(tmp_path / "undisturbed")


@pytest.mark.parametrize("patience", [0, 0.2])
def test_a_round_goes_on_without_a_board_that_does_not_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patience: float
) -> None:
    monkeypatch.setattr("server.dispatch.AGAIN_SECONDS", 0.01)
    scenario = small(server={"reconnect_timeout": patience, "connect_timeout": 0.5})
    listener = Silent()
    results = start(scenario, tmp_path / "run", listener).run(Flapping(tmp_path / "t", looks=float("inf")))
    assert results.devices_finished == 2
    assert listener.refusals[0][0] == 1
    assert len(listener.warnings) == (1 if patience else 0)
