"""The nodes behind a grid: which devices they host, and how messages reach them."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from lightcl.errors import Stopped
from lightcl.exchange.messages import ARRAYS, INSTRUCTION, REPLY, Greeting, Instruction, ProtocolError
from lightcl.exchange.tensors import Arrays

PULL_SECONDS = 0.05
RETRY_SECONDS = 10.0
TERMS = {"partitions": "num-partitions", "channels": "channels", "classes": "classes", "labels": "class names"}
"""What all nodes of a fleet must say alike, and how it is called where they do not."""
DEAD_WORKER = re.compile(r"<class 'ray\.exceptions\.(ActorDiedError|ActorUnavailableError|OutOfMemoryError)'>")
"""How Flower's simulation runtime words it. Not torch's OutOfMemoryError, nor what a ClientApp raised: those are one
device's failure and stand further on in the text."""


class RunStopped(Stopped):
    """The user asked the run to stop; it can be resumed."""


class WorkerDied(Exception):
    """A worker of the simulation is gone. Flower goes on handing it messages, which all fail at once."""


class Fleet:
    """`devices` devices on the nodes of `grid`; `instruction` is what a node is greeted with."""

    def __init__(self, grid: Grid, devices: int, instruction: Instruction, stop: threading.Event) -> None:
        self.grid, self._devices, self._stop = grid, devices, stop
        self._instruction = instruction.to_record()
        self._asked: dict[int, str] = {}  # by node, as the next three: a greeting's message that is not answered yet
        self._answered: dict[int, float] = {}  # when
        self._greetings: dict[int, Greeting] = {}
        self._errors: dict[int, str] = {}
        self._nodes: dict[int, int] = {}  # by partition: who takes part
        self.settled = False
        self.agreed: Greeting | None = None
        """What most nodes say of the fleet; the others do not take part."""

    def node_of(self, device: int) -> int | None:
        """The node that hosts a device, if it is connected."""
        return self._nodes.get(device % (self.agreed.partitions if self.agreed else self._devices))

    def name_of(self, device: int) -> str:
        node = self.node_of(device)
        return self._greetings[node].name if node is not None else ""

    @property
    def own_data(self) -> set[int]:
        """The connected devices whose images are their own; each has a node to itself."""
        return {partition for partition, node in self._nodes.items() if self._greetings[node].own_data}

    @property
    def unanswered(self) -> int:
        """How many nodes have a greeting that they did not answer yet: they may be at work on an earlier message."""
        return len(self._asked)

    @property
    def problems(self) -> list[str]:
        """What keeps nodes from taking part."""
        out = self._greetings.keys() - set(self._nodes.values())
        return sorted({*self._errors.values(), *(self._objection(self._greetings[node]) for node in out)})

    # -- who is there ------------------------------------------------------------------------------------------

    def look(self) -> None:
        """Forgets nodes that have left, greets new ones and takes in who has answered; never waits.

        A node handles one message at a time, so a greeting may wait behind a training: it stays where it is, and no
        other is sent after it. Who does not take part is asked again, since what is wrong with it may have been mended.
        """
        present = self.forget_absent()
        now = time.monotonic()
        for node in present - self._asked.keys() - set(self._nodes.values()):
            if self._answered.get(node, -RETRY_SECONDS) + RETRY_SECONDS <= now:
                content = RecordDict({INSTRUCTION: ConfigRecord(self._instruction)})
                message_id = self._push(Message(content, dst_node_id=node, message_type=MessageType.QUERY))
                if message_id:
                    self._asked[node] = message_id
        asked = {message_id: node for node, message_id in self._asked.items()}
        for reply in self._pull(asked):
            node = asked[reply.metadata.reply_to_message_id]
            del self._asked[node]
            if node in present:  # else Flower says that it has left
                self._take(node, reply)
        self._assign()

    def settle(self) -> None:
        """From now on what the fleet agreed upon stands, whoever comes or leaves."""
        self.settled = True

    def forget_absent(self) -> set[int]:
        """The nodes that are there now; what was known of others is forgotten."""
        present = set(self.grid.get_node_ids())
        self._answered = {node: at for node, at in self._answered.items() if node in present}
        self._greetings = {node: greeting for node, greeting in self._greetings.items() if node in present}
        self._errors = {node: text for node, text in self._errors.items() if node in present}
        self._nodes = {partition: node for partition, node in self._nodes.items() if node in present}
        return present

    def _take(self, node: int, reply: Message) -> None:
        self._answered[node] = time.monotonic()
        self._greetings.pop(node, None)
        self._errors.pop(node, None)
        try:
            self._greetings[node] = self._checked(reply)
        except ProtocolError as error:
            self._errors[node] = str(error)

    def _checked(self, reply: Message) -> Greeting:
        if reply.has_error():
            raise ProtocolError(f"a node answered with Flower error {reply.error.code}: {reply.error.reason}")
        record = record_of(reply)
        if "reason" in record:
            raise ProtocolError(f"a node cannot take part: {record['reason']}")
        greeting = Greeting.from_record(record)
        greeting = replace(greeting, partitions=greeting.partitions or self._devices)
        if not 0 <= greeting.partition < greeting.partitions:
            raise ProtocolError(
                f"node {greeting.name!r} has partition-id {greeting.partition} of {greeting.partitions}"
            )
        return greeting

    def _assign(self) -> None:
        """Decides who takes part: of those that agree, one node a partition."""
        if self._greetings and not self.settled:
            self.agreed = self._majority()
        agreeing = {n for n, g in self._greetings.items() if self.agreed and _terms(g) == _terms(self.agreed)}
        self._nodes = {partition: node for partition, node in self._nodes.items() if node in agreeing}
        # Of two nodes with one partition-id the first counts until it leaves: a board that restarted without a key
        # looks like two for a minute.
        for node in sorted(agreeing, key=lambda n: (self._greetings[n].name, n)):
            self._nodes.setdefault(self._greetings[node].partition, node)

    def _majority(self) -> Greeting:
        """A greeting that says what most do: a partition-id counts once, and of equally many the larger terms win."""
        groups: dict[tuple[int, int, int, str], dict[int, Greeting]] = {}
        for greeting in self._greetings.values():
            groups.setdefault(_terms(greeting), {})[greeting.partition] = greeting
        largest = max(groups, key=lambda terms: (len(groups[terms]), terms))
        return next(iter(groups[largest].values()))

    def _objection(self, greeting: Greeting) -> str:
        """Why a node that has greeted does not take part."""
        for key, name in TERMS.items():
            theirs, ours = getattr(greeting, key), getattr(self.agreed, key)
            if theirs != ours:
                return f"node {greeting.name!r} has {name} {theirs}, the fleet {ours}: it does not take part"
        other = self._greetings[self._nodes[greeting.partition]].name
        return f"nodes {other!r} and {greeting.name!r} both have partition-id {greeting.partition}: one takes part"

    # -- messages ----------------------------------------------------------------------------------------------

    def send_and_wait(
        self, messages: Mapping[int, Message], timeout: float, done: Callable[[int], None] = lambda _: None
    ) -> dict[int, Message]:
        """Replies by the same keys; those that did not come within `timeout` seconds are missing.

        Raises RunStopped and WorkerDied.
        """
        keys = {}
        for key, message in messages.items():
            message_id = self._push(message)
            if message_id:
                keys[message_id] = key
        replies: dict[int, Message] = {}
        deadline = time.monotonic() + timeout
        while len(replies) < len(keys) and time.monotonic() < deadline:
            self.pause(PULL_SECONDS)
            for reply in self._pull([i for i, key in keys.items() if key not in replies]):
                key = keys[reply.metadata.reply_to_message_id]
                replies[key] = reply
                done(key)
        return replies

    def _push(self, message: Message) -> str:
        """The message's id; empty for a node that has just left."""
        return next(iter(self.grid.push_messages([message])), "") or ""

    def _pull(self, ids: Collection[str]) -> Iterator[Message]:
        """The replies that are there. Raises WorkerDied."""
        for reply in self.grid.pull_messages(list(ids)) if ids else ():
            if reply.has_error() and DEAD_WORKER.match(reply.error.reason or ""):
                raise WorkerDied(
                    "a Ray worker died (out of memory?): set fewer simulation.workers, then go on with --resume"
                )
            yield reply

    def pause(self, seconds: float) -> None:
        """Waits. Raises RunStopped as soon as the user wants the run to end."""
        if self._stop.wait(seconds):
            raise RunStopped


def _terms(greeting: Greeting) -> tuple[int, int, int, str]:
    return greeting.partitions, greeting.channels, greeting.classes, greeting.labels


def record_of(reply: Message) -> Any:
    """The record in which a device answers; empty where there is none."""
    return reply.content.config_records.get(REPLY) or {}


def arrays_of(reply: Message) -> Arrays:
    """The tensors of an answer. Raises ProtocolError for bytes that are none."""
    try:
        return {name: array.numpy() for name, array in (reply.content.array_records.get(ARRAYS) or {}).items()}
    except (ValueError, TypeError, EOFError) as error:
        raise ProtocolError(f"its tensors cannot be decoded ({error})") from error
