"""A grid that hands messages to the real ClientApp in this process: server and devices are real, the network is not."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from flwr.app import Array, ArrayRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.supercore.task_identity import TaskIdentity

from client.app import make_app
from lightcl.exchange.messages import ARRAYS
from lightcl.exchange.wire import PACKED, decoded
from lightcl.records.folder import RunFolder
from lightcl.scenario import Scenario
from server.listeners import Listener
from server.rounds import Coordinator

SMALL: dict[str, Any] = {
    "network": {"weights": "none", "width": 4},
    "data": {"source": "digits"},
    "stream": {"tasks": 2},
    "fleet": {"devices": 3, "test_data": "whole"},
    "training": {"epochs": 2, "batch_size": 16, "learning_rate": 0.05},
    "server": {"reconnect_timeout": 0},
}


def small(**sections: dict[str, Any]) -> Scenario:
    """A scenario that takes seconds: 3 devices, 2 tasks of 8x8 digits, an untrained network of width 4."""
    merged = {key: {**SMALL.get(key, {}), **sections.get(key, {})} for key in SMALL.keys() | sections.keys()}
    return Scenario.model_validate(merged)


class InProcessGrid:
    """`simulated`: whether it stands for a simulation's grid, not for one of boards.

    `tamper(message, reply)` may change, drop (None) or replace a reply; it stands for a bad network or device.
    `root`: where the sensors of all nodes are; the default folder is missing, so that there are none."""

    def __init__(
        self,
        state: Path,
        nodes: int,
        tamper: Callable[[Message, Message], Message | None] | None = None,
        root: Path | None = None,
    ) -> None:
        # Flower's runtimes set this before an app runs; a Message cannot be made without.
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 0
        self.app = make_app(state, root=root or state / "no-sensors")
        self.nodes = {
            100 + i: Context(1, 100 + i, {"partition-id": i, "num-partitions": nodes}, RecordDict(), {})
            for i in range(nodes)
        }
        self.tamper, self.simulated = tamper, False
        self.raises: dict[str, Exception] = {}
        """What Flower raises where it cannot read a reply, by the id of the message; others asked for with it are
        lost."""
        self.sent: list[Message] = []
        self._unpacked: dict[int, tuple[ArrayRecord, ArrayRecord]] = {}  # by id, which the record keeps its own
        self.received: list[Message] = []
        self._replies: dict[str, Message] = {}
        self.waiting: dict[str, Message] = {}
        self.busy: set[int] = set()
        """Busy nodes: their messages wait."""
        self.away: set[int] = set()
        """Nodes that have lost their connection: Flower replies in their place and withdraws their messages."""

    def get_node_ids(self) -> list[int]:
        return [node for node in self.nodes if node not in self.away]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = f"message-{len(self.sent)}"
            self._unpack_shared_(message)
            self.sent.append(message)
            ids.append(message.metadata.message_id)
            self.waiting[ids[-1]] = message
            self._handle(ids[-1])
        return ids

    def _unpack_shared_(self, message: Message) -> None:
        """The messages to all devices share one record, packed or not."""
        record = message.content.array_records.get(ARRAYS)
        if record is None:
            return
        if id(record) not in self._unpacked:
            unpack_(message)
            self._unpacked[id(record)] = record, message.content.array_records[ARRAYS]
        message.content[ARRAYS] = self._unpacked[id(record)][1]

    def _handle(self, message_id: str) -> None:
        message = self.waiting[message_id]
        node = message.metadata.dst_node_id
        if node in self.away:
            reply: Message | None = Message(Error(ErrorCode.NODE_UNAVAILABLE, "Node Unavailable"), reply_to=message)
        elif node in self.busy:
            return
        else:
            reply = self.app(message, self.nodes[node])
            unpack_(reply)
            self.received.append(reply)
            if self.tamper:
                reply = self.tamper(message, reply)
        del self.waiting[message_id]
        if reply is not None:
            self._replies[message_id] = reply

    def pull_messages(self, ids: Iterable[str]) -> list[Message]:
        ids = list(ids)
        for message_id in ids:
            if message_id in self.waiting:
                self._handle(message_id)
        found = [self._replies.pop(i) for i in ids if i in self._replies]
        for message_id in ids:
            if error := self.raises.pop(message_id, None):
                raise error
        return found


def unpack_(message: Message) -> None:
    """Replaces tensors that travel as one by those that are in it, so that tests can look at them and change them."""
    record = message.content.array_records.get(ARRAYS) or {}
    if PACKED in record:
        message.content[ARRAYS] = ArrayRecord({name: Array(array) for name, array in decoded(record).items()})


class Silent(Listener):
    """A listener that remembers what was refused, warned of, and put off."""

    def __init__(self) -> None:
        self.refusals: list[tuple[int, str]] = []
        self.warnings: list[str] = []
        self.waits: list[tuple[int, str, float]] = []

    def warned(self, text: str) -> None:
        self.warnings.append(text)

    def backed_off(self, device: int, reason: str, seconds: float) -> None:
        self.waits.append((device, reason, seconds))

    def refused(self, device: int, reason: str) -> None:
        self.refusals.append((device, reason))


def rows_of_a_run(
    folder: Path, scenario: Scenario, make_client: Callable[[Path], ClientApp] = make_app
) -> list[dict[str, Any]]:
    """The rows of devices.jsonl, without times, of a run in which all devices finish; the default client is a board."""
    grid = InProcessGrid(folder / "s", scenario.fleet.devices)
    grid.app = make_client(folder / "s")
    run = RunFolder(folder / "run")
    run.begin(scenario, {"run": "r"}, [])
    results = Coordinator(scenario, run, "r", Silent(), durable=False).run(grid)
    assert results.devices_finished == scenario.fleet.devices
    found = [json.loads(line) for line in (folder / "run" / "devices.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "timing"} for row in found]
