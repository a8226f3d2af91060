"""The nodes behind a grid: which devices they host, and how messages reach them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from lightcl.protocol import INSTRUCTION, REPLY, Greeting, Instruction, ProtocolError

PULL_SECONDS = 0.05
RETRY_SECONDS = 10.0


class RunStopped(Exception):
    """The user asked the run to stop; it can be resumed."""


class Fleet:
    """`devices` devices on the nodes of `grid`; `instruction` is what a node is greeted with."""

    def __init__(self, grid: Grid, devices: int, instruction: Instruction, stop: threading.Event) -> None:
        self.grid, self._devices, self._stop = grid, devices, stop
        self._instruction = instruction.to_record()
        self._greetings: dict[int, Greeting] = {}  # by node, as are the problems: what is wrong, and when to ask again
        self._problems: dict[int, tuple[str, float]] = {}
        self._nodes: dict[int, int] = {}  # by partition
        self.first: Greeting | None = None
        """What the first node said of itself; the others must agree with it."""

    def node_of(self, device: int) -> int | None:
        """The node that hosts a device, if it is connected."""
        return self._nodes.get(device % self._partitions)

    def name_of(self, device: int) -> str:
        node = self.node_of(device)
        return self._greetings[node].name if node is not None else ""

    @property
    def problems(self) -> list[str]:
        """What keeps nodes from taking part."""
        return sorted({text for text, _ in self._problems.values()})

    @property
    def _partitions(self) -> int:
        return (self.first.partitions if self.first else 0) or self._devices

    # -- who is there ------------------------------------------------------------------------------------------

    def look(self, timeout: float) -> None:
        """Forgets nodes that have left and asks new ones which devices they host, `timeout` seconds at most."""
        present = self.forget_absent()
        now = time.monotonic()
        fresh = [n for n in present if n not in self._greetings and self._problems.get(n, ("", 0.0))[1] <= now]
        replies = self.send_and_wait(
            {
                node: Message(
                    RecordDict({INSTRUCTION: ConfigRecord(self._instruction)}),
                    dst_node_id=node,
                    message_type=MessageType.QUERY,
                )
                for node in fresh
            },
            timeout,
        )
        for node in fresh:
            try:
                self._greetings[node] = self._checked(replies.get(node))
                self._problems.pop(node, None)
            except ProtocolError as error:
                self._problems[node] = (str(error), time.monotonic() + RETRY_SECONDS)
        for node, greeting in self._greetings.items():
            # Of two nodes with one partition-id the first counts until it leaves: a board that restarted without a key
            # looks like two for a minute.
            self._nodes.setdefault(greeting.partition, node)

    def forget_absent(self) -> set[int]:
        """The nodes that are there now; what was known of others is forgotten."""
        present = set(self.grid.get_node_ids())
        self._greetings = {node: greeting for node, greeting in self._greetings.items() if node in present}
        self._problems = {node: problem for node, problem in self._problems.items() if node in present}
        self._nodes = {partition: node for partition, node in self._nodes.items() if node in present}
        return present

    def _checked(self, reply: Message | None) -> Greeting:
        if reply is None:
            raise ProtocolError("a node did not answer a greeting")
        if reply.has_error():
            raise ProtocolError(f"a node answered with Flower error {reply.error.code}: {reply.error.reason}")
        record = record_of(reply)
        if "reason" in record:
            raise ProtocolError(f"a node cannot take part: {record['reason']}")
        greeting = Greeting.from_record(record)
        first = self.first or greeting
        for key in ("partitions", "channels", "classes", "labels"):
            if getattr(greeting, key) != getattr(first, key):
                mine, theirs = getattr(greeting, key), getattr(first, key)
                raise ProtocolError(f"node {greeting.name!r} has {key} {mine}, node {first.name!r} {theirs}")
        partitions = greeting.partitions or self._devices
        if not 0 <= greeting.partition < partitions:
            raise ProtocolError(f"node {greeting.name!r} has partition-id {greeting.partition} of {partitions}")
        self.first = first
        return greeting

    # -- messages ----------------------------------------------------------------------------------------------

    def send_and_wait(
        self, messages: Mapping[int, Message], timeout: float, done: Callable[[int], None] = lambda _: None
    ) -> dict[int, Message]:
        """Replies by the same keys; those that did not come within `timeout` seconds are missing. Raises RunStopped."""
        keys = {}
        for key, message in messages.items():
            message_id = next(iter(self.grid.push_messages([message])), "")
            if message_id:  # none for a node that has just left
                keys[message_id] = key
        replies: dict[int, Message] = {}
        deadline = time.monotonic() + timeout
        while len(replies) < len(keys) and time.monotonic() < deadline:
            self.pause(PULL_SECONDS)
            for reply in self.grid.pull_messages([i for i, key in keys.items() if key not in replies]):
                key = keys[reply.metadata.reply_to_message_id]
                replies[key] = reply
                done(key)
        return replies

    def pause(self, seconds: float) -> None:
        """Waits. Raises RunStopped as soon as the user wants the run to end."""
        if self._stop.wait(seconds):
            raise RunStopped


def record_of(reply: Message) -> Any:
    """The record in which a device answers; empty where there is none."""
    return reply.content.config_records.get(REPLY) or {}
