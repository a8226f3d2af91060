"""One phase of a round: instructions to devices, and their replies sorted into reports, refusals and failures."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.constant import ErrorCode

from lightcl.data.sources import comes_to_boards
from lightcl.errors import one_line
from lightcl.exchange.messages import ARRAYS, INSTRUCTION, Instruction, ProtocolError, Refusal
from lightcl.exchange.tensors import ExchangeError
from lightcl.records.rows import DeviceRow
from lightcl.scenario import Scenario
from server.aggregation import Aggregator
from server.arrays import without_arrays
from server.ledger import Entry, Ledger
from server.listeners import Listener
from server.mailbox import AGAIN_SECONDS, ENDS_THE_RUN, LATE_SECONDS, Mailbox, record_of
from server.nodes import Nodes
from server.replies import back_off_of

T = TypeVar("T")
Read = Callable[[Entry, Message], T]
Phase = Literal["train", "evaluate"]
MOST_LOSSES = 3
"""A device that is lost so often over one message has failed: its reply may be one that the gateway cuts off."""
LEAST_BACK_OFF = 5.0
"""Seconds: a device that wants to be asked at once is not asked in an endless hurry."""


@dataclass
class _Waits:
    """Devices that are to be asked again in one phase: they have backed off, or were lost."""

    idle: set[int] = field(default_factory=set)
    """They wait for images."""
    lost: set[int] = field(default_factory=set)
    """They are not there any more."""
    until: dict[int, float] = field(default_factory=dict)
    """How long those are waited for that were lost at work."""
    losses: Counter[int] = field(default_factory=Counter)
    """How often they were lost."""
    unsent: set[int] = field(default_factory=set)
    """They were not there when the phase began, and have not got their message so far."""
    informed: set[int] = field(default_factory=set)
    """They have the shared tensors, which are not sent again: a device may be asked for days."""
    over: bool = False
    """Whether a reply has come, or a device that was not there when the phase began: the next round is due."""

    def enough(self, due: Collection[int]) -> bool:
        """Whether to leave the devices `due`, where no other is at work."""
        return self.over and self.idle.issuperset(due)


@dataclass
class Dispatch:
    """Sends instructions for the devices of a run. `rows` in its methods are the rows of the present round."""

    scenario: Scenario
    run_id: str
    mailbox: Mailbox
    nodes: Nodes
    ledger: Ledger
    listener: Listener
    aggregator: Aggregator | None

    def __post_init__(self) -> None:
        self._scenario_json = self.scenario.model_dump_json()
        self._told: dict[int, str] = {}  # why each device backed off last
        self._looked = 0.0

    def message(
        self, entry: Entry, kind: str, goal: tuple[int, int], row: DeviceRow, *, evaluate: bool = False
    ) -> Message:
        """An instruction, with the shared tensors where the device does not have this version of them.

        `evaluate`: after the training the device is tested at once.
        """
        version = self.aggregator.version if self.aggregator else 0
        instruction = Instruction(entry.number, self.run_id, self._scenario_json, row.round, *goal, version, evaluate)
        content = RecordDict({INSTRUCTION: ConfigRecord(instruction.to_record())})
        if self.aggregator and entry.version != version:
            content[ARRAYS] = self.aggregator.record
            row.bytes_down += self.aggregator.record_bytes
        node = self.nodes.node_of(entry.number) or 0
        return Message(
            content, dst_node_id=node, message_type=kind, ttl=self.scenario.server.round_timeout + LATE_SECONDS
        )

    def exchange(
        self, sent: Mapping[int, Message], rows: dict[int, DeviceRow], phase: Phase, read: Read[T]
    ) -> Iterator[tuple[Entry, Message, Callable[[], T]]]:
        """Sends and waits; gives the replies that carry a report, by device number, and notes the rest as errors.

        `read` is called with each reply as it arrives, while other devices are still at work; with the reply, which has
        no tensors any more, comes a function that returns what `read` returned, or raises what it raised.

        Devices that wait for images to train on are asked again as long as others are at work; where none is, until a
        reply has come or another device is back. Then they leave the round, and their rows are removed.

        Of a reply's tensors it keeps what `read` returned: those of a large fleet are most of the server's memory.
        """
        self.listener.phase_started(phase, len(sent))
        timeout, waits = self.scenario.server.round_timeout, _Waits()
        self.nodes.forget_absent()
        reachable = {number: m for number, m in sent.items() if self.nodes.node_of(number) == m.metadata.dst_node_id}
        for number in sent.keys() - reachable.keys():  # they left a moment ago
            waits.unsent.add(number)
            self._lost(number, waits)

        found: dict[int, Callable[[], T]] = {}

        def done(number: int, reply: Message) -> Message:
            waits.over = True
            found[number] = _called(read, self.ledger[number], reply)
            self.listener.device_done(number, phase)
            return without_arrays(reply) if reply.has_content() else reply

        replies = self.mailbox.send_and_wait(
            reachable,
            timeout,
            done,
            lambda number, reply: self._postponed(reply, rows[number], waits, phase),
            lambda number: self._again(sent[number], rows[number], waits, sent),
            waits.enough,
            sorted(waits.unsent),
        )
        for number in sorted(sent):
            reply, result = replies.pop(number, None), found.pop(number, None)
            if number in waits.idle:  # also where it is not connected any more
                del rows[number]
            elif number in waits.lost:
                self.refuse(rows[number], "not connected")
            elif reply is None or result is None:
                self.refuse(rows[number], f"no reply within {timeout:g} s")
            else:
                with self.guarded(rows[number]):
                    self._check_answers(reply, rows[number], phase)
                if rows[number].error is None:
                    yield self.ledger[number], reply, result

    def _again(self, old: Message, row: DeviceRow, waits: _Waits, sent: Container[int]) -> Message | float | None:
        """The message `old` for a device that is to be asked again; None where it is not connected any more.

        A number: it was lost, and is looked for again after so many seconds.
        """
        node = self._node_of(row.device)
        if comes_to_boards(self.scenario.data.source) and not waits.over:  # elsewhere no device waits for images
            others = [entry.number for entry in self.ledger.active if entry.number not in sent]
            waits.over = any(self.nodes.node_of(number) is not None for number in others)
        if node is None and time.monotonic() < waits.until.get(row.device, 0.0):
            return AGAIN_SECONDS
        if node is None:
            waits.lost.add(row.device)
            return None
        waits.idle.discard(row.device)
        content = old.content
        if row.device in waits.informed:
            content = RecordDict({INSTRUCTION: old.content[INSTRUCTION]})
        elif self.aggregator and ARRAYS in content and row.device not in waits.unsent:
            row.bytes_down += self.aggregator.record_bytes
        waits.unsent.discard(row.device)
        return Message(content, dst_node_id=node, message_type=old.metadata.message_type, ttl=old.metadata.ttl)

    def _node_of(self, number: int) -> int | None:
        """The node of a device, if it is connected now.

        Nodes that have come back are greeted at most once a second, and a device that was not there is no reason to ask
        again who is: a thousand may be lost at once.
        """
        if time.monotonic() - self._looked >= AGAIN_SECONDS:
            self._looked = time.monotonic()
            self.nodes.update()
        elif self.nodes.node_of(number) is not None:
            self.nodes.forget_absent()
        return self.nodes.node_of(number)

    def _lost(self, number: int, waits: _Waits) -> float | None:
        """After how many seconds a lost device is looked for; None where its time in this phase is over."""
        now, patience = time.monotonic(), self.scenario.server.reconnect_timeout
        waits.losses[number] += 1
        if number not in waits.until:
            waits.until[number] = now + patience
            if patience:
                text = f"device {number} is lost; it is waited for, {patience:g} s at most (server.reconnect_timeout)"
                self.listener.warned(text)
        return AGAIN_SECONDS if now < waits.until[number] and waits.losses[number] < MOST_LOSSES else None

    def _postponed(self, reply: Message, row: DeviceRow, waits: _Waits, phase: Phase) -> float | None:
        """After how many seconds a device that backs off or is lost is asked again; None where it is to be done with.

        None, too, where the device has used up its waits of this round (`server.longest_back_off`), or says nonsense:
        the reply is then a failure, unless the device waits for images to train on. That it waits for images to be
        tested is nonsense: it is tested on tasks that it has learned.
        """
        if not self.mailbox.simulated and reply.has_error() and reply.error.code == ErrorCode.NODE_UNAVAILABLE:
            return self._lost(row.device, waits)
        try:
            found = back_off_of(reply)
        except ENDS_THE_RUN:
            raise
        except Exception:  # of any kind: the reply was made elsewhere
            return None
        if found is None or (found.for_images and phase == "evaluate"):
            return None
        if found.for_images and comes_to_boards(self.scenario.data.source):
            waits.idle.add(row.device)
        if self.aggregator and found.version == self.aggregator.version:
            waits.informed.add(row.device)
        left = self.scenario.server.longest_back_off - (row.backed_off_seconds or 0.0)
        if left <= 0:
            return None
        seconds = min(max(found.retry_after, LEAST_BACK_OFF), left)
        row.add_back_off_(seconds, found.reason)
        if row.device not in waits.idle or self._told.get(row.device) != found.reason:  # a device may wait for weeks
            self.listener.backed_off(row.device, found.reason, seconds)
        self._told[row.device] = found.reason
        return seconds

    @contextmanager
    def guarded(self, row: DeviceRow) -> Iterator[None]:
        """Whatever goes wrong inside with a device's reply is a failure of this device alone."""
        try:
            yield
        except ENDS_THE_RUN:
            raise
        except (ProtocolError, ExchangeError) as error:
            self.refuse(row, str(error))
        except Exception as error:  # of any kind: the reply was made elsewhere, and MemoryError is among them
            self.refuse(row, f"its reply cannot be used ({type(error).__name__}: {error})")

    def refuse(self, row: DeviceRow, reason: str) -> None:
        """The device has failed in this round."""
        row.error = one_line(reason)
        self.listener.refused(row.device, row.error)

    def _check_answers(self, reply: Message, row: DeviceRow, phase: Phase) -> None:
        """Raises ProtocolError for a reply that carries no report; a refusal may move the device in the ledger."""
        if reply.has_error():
            raise ProtocolError(f"Flower error {reply.error.code}: {reply.error.reason}")
        if found := back_off_of(reply):
            if found.for_images and phase == "evaluate":
                raise ProtocolError(f"waits for images, but is to be tested on what it has learned: {found.reason}")
            waited = row.backed_off_seconds or 0.0
            raise ProtocolError(f"backed off for {waited:g} s in this round (server.longest_back_off): {found.reason}")
        if "reason" in record_of(reply):
            refusal = Refusal.from_record(record_of(reply))
            self.ledger.follow_(row.device, refusal)
            raise ProtocolError(refusal.reason)


def _called(read: Read[T], entry: Entry, reply: Message) -> Callable[[], T]:
    """A function, to be called once, that returns what `read` returns now, or raises what it raises now."""
    try:
        result = read(entry, reply)
    except ENDS_THE_RUN:
        raise
    except Exception as error:  # of any kind: the reply was made elsewhere
        # The error is all that stays: tracebacks, also those of its causes, would keep the reply's tensors.
        error.__cause__ = error.__context__ = None
        raised = [error.with_traceback(None)]

        def fail() -> T:
            raise raised.pop()  # nor may this frame, which is in the new traceback, keep the error

        return fail
    return lambda: result
