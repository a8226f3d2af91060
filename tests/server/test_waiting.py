"""`Mailbox.send_and_wait` where replies ask to be asked again: with a grid of this file and no device."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from lightcl.exchange.tensors import ExchangeError
from lightcl.records.folder import RunFolder
from server.dispatch import _called
from server.ledger import Entry
from server.mailbox import Mailbox, RunStopped
from server.replies import AcceptedTraining, ReplyCheck
from server.rounds import Coordinator
from tests.inprocess import InProcessGrid, Silent, small


class Grid:
    """Replies to each message at once, and counts those of each node."""

    simulated = False

    def __init__(self) -> None:
        self.sent: list[int] = []
        self._replies: dict[str, Message] = {}

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            ids.append(f"message-{len(self.sent)}")
            message.metadata.__dict__["_message_id"] = ids[-1]
            self.sent.append(message.metadata.dst_node_id)
            number = self.sent.count(message.metadata.dst_node_id)
            self._replies[ids[-1]] = Message(RecordDict({"reply": ConfigRecord({"number": number})}), reply_to=message)
        return ids

    def pull_messages(self, ids: Iterable[str]) -> list[Message]:
        return [self._replies.pop(i) for i in list(ids) if i in self._replies]


def message_for(node: int) -> Message:
    return Message(RecordDict(), dst_node_id=node, message_type="train")


def number_of(reply: Message) -> int:
    return int(reply.content.config_records["reply"]["number"])  # type: ignore[arg-type]


def wait(tmp_path: Path, grid: Grid, **hooks: object) -> dict[int, int]:
    InProcessGrid(tmp_path, 0)  # sets what Flower's messages need
    mailbox = Mailbox(grid, threading.Event())  # type: ignore[arg-type]
    sent = {key: message_for(node) for key, node in ((0, 100), (1, 101))}
    replies = mailbox.send_and_wait(sent, 60, **hooks)  # type: ignore[arg-type]
    return {key: number_of(reply) for key, reply in replies.items()}


def test_a_reply_that_asks_for_later_is_not_done(tmp_path: Path) -> None:
    grid, done = Grid(), []
    found = wait(
        tmp_path, grid, done=lambda key, reply: (done.append(key), reply)[1],
        postponed=lambda key, reply: 0.01 if key == 1 and number_of(reply) < 3 else None,
        again=lambda key: message_for(100 + key),
    )  # fmt: skip
    assert found == {0: 1, 1: 3}
    assert grid.sent == [100, 101, 101, 101]
    assert done == [0, 1]


def test_a_device_that_is_not_back_is_looked_for_again(tmp_path: Path) -> None:
    grid, looks = Grid(), [0.01, 0.02, message_for(101)]
    found = wait(
        tmp_path, grid, postponed=lambda key, reply: 0.01 if key == 1 and number_of(reply) < 2 else None,
        again=lambda _: looks.pop(0),
    )  # fmt: skip
    assert found == {0: 1, 1: 2}
    assert grid.sent == [100, 101, 101]
    assert not looks


def test_a_device_that_is_gone_by_then_is_missing(tmp_path: Path) -> None:
    grid = Grid()
    found = wait(tmp_path, grid, postponed=lambda key, _: 0.01 if key == 1 else None, again=lambda _: None)
    assert found == {0: 1}
    assert grid.sent == [100, 101]


def test_the_time_of_a_check_is_no_devices_time(tmp_path: Path) -> None:
    class SlowGrid(Grid):
        def pull_messages(self, ids: Iterable[str]) -> list[Message]:
            return super().pull_messages(list(ids)[:1])  # the second reply comes after the first was looked at

    def check(_: int, reply: Message) -> Message:
        time.sleep(0.3)
        return reply

    InProcessGrid(tmp_path, 0)  # sets what Flower's messages need
    mailbox = Mailbox(SlowGrid(), threading.Event())  # type: ignore[arg-type]
    replies = mailbox.send_and_wait({0: message_for(100), 1: message_for(101)}, 0.25, check)
    assert replies.keys() == {0, 1}


def test_a_reply_is_checked_while_others_are_at_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = InProcessGrid(tmp_path / "s", 3)
    check = ReplyCheck.training

    def training(self: ReplyCheck, reply: Message, entry: Entry, *given: Any) -> AcceptedTraining:
        if entry.number == 0:
            grid.busy.clear()
        return check(self, reply, entry, *given)

    monkeypatch.setattr(ReplyCheck, "training", training)
    scenario, listener = small(server={"round_timeout": 20, "aggregation": "suffix"}), Silent()
    folder = RunFolder(tmp_path / "run")
    folder.begin(scenario, {"run": "r"}, [])
    coordinator = Coordinator(scenario, folder, "r", listener)
    monkeypatch.setattr(listener, "phase_started", lambda phase, _: grid.busy.update({102} if phase == "train" else ()))
    monkeypatch.setattr(listener, "round_finished", lambda *_: coordinator.stop.set())
    with pytest.raises(RunStopped):
        coordinator.run(grid)
    assert not listener.refusals, "the third device was at work until the first reply was checked"


def test_of_a_refused_reply_only_the_reason_stays() -> None:
    """Without help of Python's collector, which may not come for many rounds."""

    class Tensors:
        pass

    alive: list[weakref.ref[Tensors]] = []

    def read(*_: object) -> None:
        tensors = Tensors()
        alive.append(weakref.ref(tensors))
        try:
            raise KeyError("layer4")
        except KeyError as error:
            raise ExchangeError("no such tensor") from error

    def use(result: Callable[[], None]) -> str:
        of_the_round = Tensors()
        alive.append(weakref.ref(of_the_round))
        try:
            result()
        except ExchangeError as error:
            return str(error)
        return ""

    gc.disable()
    try:
        result = _called(read, None, None)  # type: ignore[arg-type]
        assert alive[0]() is None, "it may have been as large as a reply may be"
        assert use(result) == "no such tensor"
        assert [reference() for reference in alive] == [None, None]
    finally:
        gc.enable()
