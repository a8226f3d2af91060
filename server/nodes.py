"""The nodes behind a grid: which of them take part, and which devices they host."""

from __future__ import annotations

import time
from dataclasses import replace

from flwr.app import ConfigRecord, Message, MessageType, RecordDict

from lightcl.data.streams.class_incremental import MOST_CLASSES
from lightcl.errors import shown
from lightcl.exchange.messages import INSTRUCTION, Greeting, Instruction, ProtocolError
from server.mailbox import Mailbox, record_of

RETRY_SECONDS = 10.0
TERMS = {"partitions": "num-partitions", "channels": "channels", "classes": "classes", "labels": "class names"}
"""The fields of a greeting that must be the same on all nodes of a fleet, with their names in errors."""

MOST_CHANNELS = 1024
"""The server builds a network of this size, so a node may not name any."""


class Nodes:
    """`devices` devices on the nodes behind `mailbox`; `instruction` is the greeting that a node is sent.

    `tasks` is the number of tasks of the scenario, `classes` the least and the most classes that the fleet's head may
    have under it.
    """

    def __init__(
        self, mailbox: Mailbox, devices: int, tasks: int, instruction: Instruction,
        classes: tuple[int, int] = (1, MOST_CLASSES),
    ) -> None:  # fmt: skip
        self._mailbox, self._devices, self._tasks = mailbox, devices, tasks
        self._bounds = {"channels": (1, MOST_CHANNELS), "classes": (classes[0], min(classes[1], MOST_CLASSES))}
        self._instruction = instruction.to_record()
        self._asked: dict[int, str] = {}  # by node, as the next three: the id of a greeting without a reply so far
        self._replied: dict[int, float] = {}  # when
        self._greetings: dict[int, Greeting] = {}
        self._errors: dict[int, str] = {}
        self._hosts: dict[int, int] = {}  # by partition: the node that takes part
        self.settled = False
        self.agreed: Greeting | None = None
        """The terms of the majority of nodes; nodes with other terms do not take part."""

    def node_of(self, device: int) -> int | None:
        """The node that hosts a device, if it is connected."""
        return self._hosts.get(device % (self.agreed.partitions if self.agreed else self._devices))

    def name_of(self, device: int) -> str:
        node = self.node_of(device)
        return self._greetings[node].name if node is not None else ""

    @property
    def own_data(self) -> dict[int, tuple[int, ...]]:
        """The connected devices whose images are their own, with the tasks that each can learn.

        Each has a node to itself.
        """
        greetings = {partition: self._greetings[node] for partition, node in self._hosts.items()}
        return {partition: tuple(greeting.tasks) for partition, greeting in greetings.items() if greeting.own_data}

    @property
    def unanswered(self) -> int:
        """Nodes that have not replied to their greeting so far: they may be at work on an earlier message."""
        return len(self._asked)

    @property
    def problems(self) -> list[str]:
        """Why nodes do not take part."""
        out = self._greetings.keys() - set(self._hosts.values())
        return sorted({*self._errors.values(), *(self._objection(self._greetings[node]) for node in out)})

    def update(self) -> None:
        """Forgets nodes that have left, greets new ones and reads their replies; never waits.

        A node handles one message at a time, so a greeting may wait behind a training: it stays there, and no second
        one is sent. A node that does not take part is asked again, since its problem may have been fixed.
        """
        present = self.forget_absent()
        now = time.monotonic()
        for node in present - self._asked.keys() - set(self._hosts.values()):
            if self._replied.get(node, -RETRY_SECONDS) + RETRY_SECONDS <= now:
                content = RecordDict({INSTRUCTION: ConfigRecord(self._instruction)})
                message_id = self._mailbox.push(Message(content, dst_node_id=node, message_type=MessageType.QUERY))
                if message_id:
                    self._asked[node] = message_id
        asked = {message_id: node for node, message_id in self._asked.items()}
        for reply in self._mailbox.pull(asked):
            node = asked[reply.metadata.reply_to_message_id]
            del self._asked[node]
            if node in present:  # otherwise Flower says that it has left
                self._read(node, reply)
        self._assign()

    def settle(self) -> None:
        """From now on the agreed terms stay, whichever nodes come or leave."""
        self.settled = True

    def forget_absent(self) -> set[int]:
        """The nodes that are connected now; everything known of others is forgotten."""
        present = self._mailbox.connected_nodes()
        self._replied = {node: at for node, at in self._replied.items() if node in present}
        self._greetings = {node: greeting for node, greeting in self._greetings.items() if node in present}
        self._errors = {node: text for node, text in self._errors.items() if node in present}
        self._hosts = {partition: node for partition, node in self._hosts.items() if node in present}
        return present

    def _read(self, node: int, reply: Message) -> None:
        self._replied[node] = time.monotonic()
        self._greetings.pop(node, None)
        self._errors.pop(node, None)
        try:
            self._greetings[node] = self._checked(reply)
        except ProtocolError as error:
            self._errors[node] = str(error)

    def _checked(self, reply: Message) -> Greeting:
        if reply.has_error():
            raise ProtocolError(f"a node replied with Flower error {reply.error.code}: {reply.error.reason}")
        record = record_of(reply)
        if "reason" in record:
            raise ProtocolError(f"a node cannot take part: {record['reason']}")
        greeting = Greeting.from_record(record)
        greeting = replace(greeting, partitions=greeting.partitions or self._devices)
        if greeting.tasks != sorted(set(greeting.tasks) & set(range(self._tasks))):
            raise ProtocolError(
                f"node {greeting.name!r} can learn the tasks {shown(greeting.tasks)}, expected ascending numbers from "
                f"0 to {self._tasks - 1}"
            )
        if not 0 <= greeting.partition < greeting.partitions:
            raise ProtocolError(
                f"node {greeting.name!r} has partition-id {greeting.partition} of {greeting.partitions}"
            )
        if greeting.own_data and not greeting.partition < self._devices <= greeting.partitions:
            raise ProtocolError(
                f"node {greeting.name!r} has own-data, so it is one device, but partition-id {greeting.partition} of "
                f"{greeting.partitions} is not one of {self._devices} devices"
            )
        for name, (least, most) in self._bounds.items():
            if not least <= getattr(greeting, name) <= most:
                allowed = f"{least} to {most}" if least < most else f"{most}"
                raise ProtocolError(
                    f"node {greeting.name!r} has images with {getattr(greeting, name)} {name}, expected {allowed}"
                )
        return greeting

    def _assign(self) -> None:
        """Decides which nodes take part: of those that agree, one per partition."""
        if self._greetings and not self.settled:
            self.agreed = self._majority()
        agreeing = {n for n, g in self._greetings.items() if self.agreed and _terms(g) == _terms(self.agreed)}
        self._hosts = {partition: node for partition, node in self._hosts.items() if node in agreeing}
        # Of two nodes with one partition-id the first counts until it leaves: a board that restarted without a key
        # looks like two for a minute.
        for node in sorted(agreeing, key=lambda n: (self._greetings[n].name, n)):
            self._hosts.setdefault(self._greetings[node].partition, node)

    def _majority(self) -> Greeting:
        """A greeting with the terms of the majority: a partition-id counts once, and in a tie the larger terms win."""
        groups: dict[tuple[int, int, int, str], dict[int, Greeting]] = {}
        for greeting in self._greetings.values():
            groups.setdefault(_terms(greeting), {})[greeting.partition] = greeting
        largest = max(groups, key=lambda terms: (len(groups[terms]), terms))
        return next(iter(groups[largest].values()))

    def _objection(self, greeting: Greeting) -> str:
        """Why a node that has sent a greeting does not take part."""
        for key, name in TERMS.items():
            given, agreed = getattr(greeting, key), getattr(self.agreed, key)
            if given != agreed:
                return f"node {greeting.name!r} has {name} {given}, the fleet {agreed}: it does not take part"
        other = self._greetings[self._hosts[greeting.partition]].name
        return f"nodes {other!r} and {greeting.name!r} both have partition-id {greeting.partition}: one takes part"


def _terms(greeting: Greeting) -> tuple[int, int, int, str]:
    return greeting.partitions, greeting.channels, greeting.classes, greeting.labels
