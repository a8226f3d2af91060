"""The nodes behind a grid: which of them take part, and which devices they host."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Self

from flwr.app import ConfigRecord, Message, MessageType, RecordDict

from lightcl.assembly import stream_plan
from lightcl.data.streams import head_bounds
from lightcl.data.streams.class_incremental import MOST_CLASSES
from lightcl.errors import one_line, shown
from lightcl.exchange.messages import INSTRUCTION, Greeting, Instruction, ProtocolError
from lightcl.scenario import Scenario
from server.mailbox import ENDS_THE_RUN, LATE_SECONDS, Mailbox, record_of

RETRY_SECONDS = 10.0
TERMS = {"partitions": "num-partitions", "channels": "channels", "classes": "classes", "labels": "class names"}
"""The fields of a greeting that must be the same on all nodes of a fleet, with their names in errors."""

MOST_CHANNELS = 1024
"""The server builds a network of this size, so a node may not name any."""

MOST_NODES, LONGEST_NAME = 1_000_000, 100


@dataclass(frozen=True)
class Expected:
    """What decides between nodes that disagree, where neither side has the majority.

    `classes` are the least and the most classes that the fleet's head may have; `images` the channels of the server's
    own images and the classes and class names (digest) of the head under them, where it has any.
    """

    devices: int
    tasks: int
    classes: tuple[int, int]
    images: tuple[int, int, str] | None = None

    @classmethod
    def of(cls, scenario: Scenario, images: tuple[int, int, str] | None) -> Self:
        least, most = head_bounds(stream_plan(scenario))
        return cls(scenario.fleet.devices, scenario.stream.tasks, (least, min(most, MOST_CLASSES)), images)


@dataclass(frozen=True)
class Asked:
    """A greeting without a reply so far. `silent`: this node has let one expire before it."""

    message_id: str
    message: Message
    at: float
    silent: bool


class Nodes:
    """The nodes behind `mailbox`; `instruction` is the greeting that a node is sent.

    A node that does not reply within `timeout` seconds is asked again, since it may have lost the greeting when it was
    killed. In a simulation no greeting is lost, and it may take as long as it takes.
    """

    def __init__(self, mailbox: Mailbox, expected: Expected, instruction: Instruction, timeout: float) -> None:
        self._mailbox, self._expected, self._timeout = mailbox, expected, timeout
        self._devices, self._tasks = expected.devices, expected.tasks
        self._bounds = {"channels": (1, MOST_CHANNELS), "classes": expected.classes}
        self._instruction = instruction.to_record()
        self._asked: dict[int, Asked] = {}  # by node, as the next three
        self._replied: dict[int, float] = {}  # when
        self._greetings: dict[int, Greeting] = {}
        self._errors: dict[int, str] = {}
        self._took_part: set[int] = set()
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
    def busy(self) -> int:
        """Those of them that have taken part before: they are probably at work on an earlier message."""
        return len(self._asked.keys() & self._took_part)

    @property
    def awaited(self) -> int:
        """Those of them whose first greeting has not expired yet: they may reply at any moment."""
        return sum(not asked.silent for asked in self._asked.values())

    @property
    def problems(self) -> list[str]:
        """Why nodes do not take part."""
        out = self._greetings.keys() - set(self._hosts.values())
        return sorted({*self._errors.values(), *(self._objection(self._greetings[node]) for node in out)})

    def update(self) -> None:
        """Forgets nodes that have left, greets new ones and reads their replies; never waits.

        A node handles one message at a time, so a greeting may wait behind a training. It expires, and the next one is
        sent, so that one at most is with a node. A node that does not take part is asked again, since its problem may
        have been fixed.
        """
        present = self.forget_absent()
        now = time.monotonic()
        silent = {node for node, asked in self._asked.items() if asked.silent and node in present}
        if not self._mailbox.simulated:
            for node in [n for n, asked in self._asked.items() if asked.at + self._timeout <= now]:
                del self._asked[node]
                silent.add(node)
        for node in present - self._asked.keys() - set(self._hosts.values()):
            if self._replied.get(node, -RETRY_SECONDS) + RETRY_SECONDS <= now:
                self._greet(node, now, node in silent)
        asked = {asked.message_id: node for node, asked in self._asked.items()}
        for reply in self._mailbox.pull({asked.message_id: asked.message for asked in self._asked.values()}):
            node = asked[reply.metadata.reply_to_message_id]
            self._asked.pop(node, None)
            if node in present:  # otherwise Flower says that it has left
                self._read(node, reply)
        self._assign()

    def _greet(self, node: int, now: float, silent: bool) -> None:
        content = RecordDict({INSTRUCTION: ConfigRecord(self._instruction)})
        ttl = None if self._mailbox.simulated else self._timeout + LATE_SECONDS
        message = Message(content, dst_node_id=node, message_type=MessageType.QUERY, ttl=ttl)
        if message_id := self._mailbox.push(message):
            self._asked[node] = Asked(message_id, message, now, silent)

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
        except ENDS_THE_RUN:
            raise
        except ProtocolError as error:
            self._errors[node] = one_line(str(error))
        except Exception as error:  # of any kind: the reply was made elsewhere
            self._errors[node] = one_line(f"a node's greeting cannot be used ({type(error).__name__}: {error})")

    def _checked(self, reply: Message) -> Greeting:
        if reply.has_error():
            raise ProtocolError(f"a node replied with Flower error {reply.error.code}: {reply.error.reason}")
        record = record_of(reply)
        if "reason" in record:
            raise ProtocolError(f"a node cannot take part: {record['reason']}")
        greeting = Greeting.from_record(record)
        greeting = replace(
            greeting, name=one_line(greeting.name, LONGEST_NAME), partitions=greeting.partitions or self._devices
        )
        if greeting.tasks != sorted(set(greeting.tasks) & set(range(self._tasks))):
            raise ProtocolError(
                f"node {greeting.name!r} can learn the tasks {shown(greeting.tasks)}, expected ascending numbers from "
                f"0 to {self._tasks - 1}"
            )
        if not 0 <= greeting.partition < greeting.partitions <= MOST_NODES:
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
        self._took_part.update(self._hosts.values())

    def _majority(self) -> Greeting:
        """A greeting with the terms of the majority: a partition-id counts once.

        In a tie the server's own images decide, then the scenario, then the smaller terms: a node that makes them up
        gains nothing from large ones.
        """
        groups: dict[tuple[int, int, int, str], dict[int, Greeting]] = {}
        for greeting in self._greetings.values():
            groups.setdefault(_terms(greeting), {})[greeting.partition] = greeting
        expected = self._expected

        def rank(terms: tuple[int, int, int, str]) -> tuple[object, ...]:
            fits = (terms[1:] == expected.images, terms[0] == expected.devices, terms[2] >= expected.classes[0])
            return (-len(groups[terms]), *(not fit for fit in fits), terms)

        return next(iter(groups[min(groups, key=rank)].values()))

    def _objection(self, greeting: Greeting) -> str:
        """Why a node that has sent a greeting does not take part."""
        for key, name in TERMS.items():
            given, agreed = getattr(greeting, key), getattr(self.agreed, key)
            if given != agreed:
                said = one_line(str(given), 80)
                return f"node {greeting.name!r} has {name} {said}, the fleet {agreed}: it does not take part"
        other = self._greetings[self._hosts[greeting.partition]].name
        return f"nodes {other!r} and {greeting.name!r} both have partition-id {greeting.partition}: one takes part"


def _terms(greeting: Greeting) -> tuple[int, int, int, str]:
    return greeting.partitions, greeting.channels, greeting.classes, greeting.labels
