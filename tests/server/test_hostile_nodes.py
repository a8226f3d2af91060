"""Nodes that lie about where they are, who they are or what happened to them: none ends a run or takes it over."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Error, Message
from flwr.common.constant import ErrorCode
from ray.exceptions import ActorDiedError

from lightcl.records import load_run
from lightcl.records.folder import DEVICES, EVENTS, RunFolder
from lightcl.records.rows import Results
from lightcl.scenario import Scenario
from server.rounds import Coordinator
from tests.inprocess import InProcessGrid, Silent, small

Tamper = Callable[[Message, Message], Message | None]


def run(tmp_path: Path, scenario: Scenario, tamper: Tamper) -> tuple[Results, Silent]:
    folder, listener = RunFolder(tmp_path / "run"), Silent()
    folder.begin(scenario, {"run": "r"}, [])
    return Coordinator(scenario, folder, "r", listener).run(InProcessGrid(tmp_path / "s", 3, tamper)), listener


def asks(message: Message, kind: str, device: int) -> bool:
    return message.metadata.message_type == kind and message.content["instruction"]["device"] == device


def refuse_(reply: Message, task: int, epochs: int, reason: str, version: int = 0) -> Message:
    for name in list(reply.content):
        del reply.content[name]
    reply.content["reply"] = ConfigRecord({"task": task, "epochs": epochs, "version": version, "reason": reason})
    return reply


@pytest.mark.parametrize("kind", ["query", "train", "evaluate"])
def test_a_board_cannot_say_that_a_worker_of_ours_has_died(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("server.nodes.RETRY_SECONDS", 0.0)
    error = ActorDiedError()
    left = [1]

    def lie(message: Message, reply: Message) -> Message:
        board = message.metadata.dst_node_id == 101
        if board and message.metadata.message_type == kind and left:
            left.pop()
            return Message(Error(ErrorCode.UNKNOWN, f"{type(error)}:<'{error}'>"), reply_to=message)
        return reply

    results, listener = run(tmp_path, small(stream={"tasks": 1}, server={"aggregation": "suffix"}), lie)
    assert not left
    assert results.devices_finished == 3, "it is asked again"
    said = [reason for device, reason in listener.refusals if device == 1] + caplog.messages
    assert len(said) == 1
    assert "ActorDiedError" in said[0]


def test_a_device_that_begins_anew_every_second_message_is_dropped(tmp_path: Path) -> None:
    asked: list[int] = []

    def lie(message: Message, reply: Message) -> Message:
        if asks(message, "train", 1):
            asked.append(message.content["instruction"]["task"])
            if len(asked) % 2 == 0:
                shutil.rmtree(tmp_path / "s" / "r" / "device-00001")
                return refuse_(reply, 0, 0, f"OutOfStep: cause number {len(asked)}")
        return reply

    results, _ = run(tmp_path, small(stream={"tasks": 3}), lie)
    assert results.devices_finished == 2
    assert results.dropped.keys() == {1}
    assert results.dropped[1].startswith("lost what it had learned a second time (OutOfStep: cause number")
    assert asked == [0, 1, 0, 1]


def test_causes_that_a_device_makes_up_are_one_cause(tmp_path: Path) -> None:
    asked: list[int] = []

    def lie(message: Message, reply: Message) -> Message:
        if asks(message, "train", 1):
            asked.append(1)
            if len(asked) % 2 == 0:
                shutil.rmtree(tmp_path / "s" / "r" / "device-00001")
                return refuse_(reply, 0, 0, f"Cause{len(asked)}: another one")
        return reply

    results, _ = run(tmp_path, small(stream={"tasks": 3}), lie)
    assert results.dropped == {1: "lost what it had learned a second time (Cause4: another one)"}
    assert len(asked) == 4


def test_a_device_that_fails_every_second_time_is_dropped_in_the_end(tmp_path: Path) -> None:
    asked: list[int] = []

    def fail(message: Message, reply: Message) -> Message:
        if asks(message, "train", 1):
            asked.append(1)
            if len(asked) % 2:
                reply.content["reply"]["loss"] = float("nan")
        return reply

    scenario = small(stream={"tasks": 5}, training={"learning_rate": 0.01}, server={"max_failures_in_run": 3})
    results, _ = run(tmp_path, scenario, fail)
    assert results.devices_finished == 2
    assert results.dropped[1].startswith("failed in 3 rounds (server.max_failures_in_run), last: ")
    assert load_run(tmp_path / "run").dropped == results.dropped


@pytest.mark.parametrize("aggregation", ["none", "suffix"])
def test_a_device_does_not_jump_to_the_end_by_refusing(tmp_path: Path, aggregation: str) -> None:
    """It says that it is at the end of its last task and has a test ready."""

    def lie(message: Message, reply: Message) -> Message:
        if asks(message, "train", 1):
            return refuse_(reply, 1, 2, "OutOfStep: I am at the end")
        if asks(message, "evaluate", 1):
            made_up = {"device": 1, "task": 1, "epochs": 2, "version": 0, "seconds": 1.0, "tasks": [0, 1]}
            reply.content["reply"] = ConfigRecord(made_up | {"til": [1.0] * 2, "cil": [1.0] * 2, "images": [9] * 2})
        return reply

    results, _ = run(tmp_path, small(server={"aggregation": aggregation}), lie)
    assert results.devices_finished == 2
    assert results.dropped == {1: "OutOfStep: I am at the end"}
    assert all(row.til is None for row in load_run(tmp_path / "run").devices if row.device == 1)


def test_a_device_that_lost_its_state_learns_again_from_its_beginning(tmp_path: Path) -> None:
    """The honest case: its folder is gone before the second task."""
    lost = [1]

    def lose(message: Message, reply: Message) -> Message:
        if asks(message, "train", 1) and message.content["instruction"]["task"] == 0 and lost:
            lost.pop()
            shutil.rmtree(tmp_path / "s" / "r" / "device-00001")
        return reply

    results, listener = run(tmp_path, small(), lose)
    assert results.devices_finished == 3
    assert [device for device, _ in listener.refusals] == [1]
    assert [row.task for row in load_run(tmp_path / "run").devices if row.device == 1] == [0, 0, 0, 1]


def test_texts_of_devices_are_cut_wherever_they_are_kept(tmp_path: Path) -> None:
    long = "x" * 5_000_000

    def shout(message: Message, reply: Message) -> Message:
        if message.metadata.message_type == "query":
            reply.content["reply"]["name"] = f"board\x1b[2J\n{long}"
        elif asks(message, "train", 1):
            return refuse_(reply, 0, 0, long)
        elif asks(message, "train", 2) and message.content["instruction"]["round"] == 1:
            reply.content["reply"]["prefix"] = long
        elif asks(message, "train", 0) and message.content["instruction"]["round"] == 1:
            reply.content["reply"]["examples"] = long
        return reply

    results, listener = run(tmp_path, small(), shout)
    assert (results.devices_finished, results.dropped.keys()) == (2, {1})
    assert {device for device, _ in listener.refusals} == {0, 1, 2}
    assert all(len(reason) <= 500 for _, reason in listener.refusals)
    kept = {name: (tmp_path / "run" / name).read_text() for name in (DEVICES, EVENTS, "results.json")}
    assert all(len(line) < 2000 for text in kept.values() for line in text.splitlines())
    names = {json.loads(line)["name"] for line in kept[DEVICES].splitlines()}
    assert all(len(name) == 100 and name.startswith("board?[2J xxx") for name in names)


def test_a_reply_that_flower_cannot_read_is_one_devices_failure(tmp_path: Path) -> None:
    """Flower raises what it likes for it, and loses the replies that were asked for together with it."""
    grid = InProcessGrid(tmp_path / "s", 3)

    def spoil(message: Message, reply: Message) -> Message:
        if asks(message, "train", 1) and message.content["instruction"]["round"] <= 2:
            grid.raises[message.metadata.message_id] = KeyError("no such class")
        return reply

    grid.tamper = spoil
    scenario = small(server={"round_timeout": 0.5})
    folder, listener = RunFolder(tmp_path / "run"), Silent()
    folder.begin(scenario, {"run": "r"}, [])
    assert Coordinator(scenario, folder, "r", listener).run(grid).devices_finished == 3
    second = [(row.device, row.error) for row in load_run(folder.path).devices if row.round == 2 and row.error]
    assert [device for device, _ in second] == [1], "asked for one by one, the others are not lost"
    assert "the reply cannot be read (KeyError" in str(second[0][1])


@pytest.mark.parametrize("error", [MemoryError, OverflowError, ValueError, RecursionError, TypeError])
def test_whatever_happens_with_a_reply_is_its_devices_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    """Raised by the real decoding of a reply whose bytes begin with a mark."""
    from server import replies

    decode = replies.size_in_bytes

    def size(arrays: Any) -> int:
        if any(array.size and array.flat[0] == 12345 for array in arrays.values()):
            raise error("made up")
        return decode(arrays)

    def mark(message: Message, reply: Message) -> Message:
        if asks(message, "train", 1) and message.content["instruction"]["round"] == 1:
            from flwr.app import Array, ArrayRecord

            arrays = {name: array.numpy().copy() for name, array in reply.content["arrays"].items()}
            arrays["layer4.0.bn1.weight"].flat[0] = 12345
            reply.content["arrays"] = ArrayRecord({name: Array(array) for name, array in arrays.items()})
        return reply

    monkeypatch.setattr(replies, "size_in_bytes", size)
    results, listener = run(tmp_path, small(stream={"tasks": 1}, server={"aggregation": "suffix"}), mark)
    assert results.devices_finished == 3
    assert listener.refusals == [(1, f"its reply cannot be used ({error.__name__}: made up)")]
