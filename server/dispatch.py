"""One phase of a round: instructions to devices, and their replies sorted into reports, refusals and failures."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.constant import ErrorCode

from lightcl.errors import one_line
from lightcl.exchange.messages import ARRAYS, INSTRUCTION, Instruction, ProtocolError, Refusal
from lightcl.exchange.tensors import ExchangeError
from lightcl.records.rows import DeviceRow
from lightcl.scenario import Scenario
from server.aggregation import Aggregator
from server.ledger import Entry, Ledger
from server.listeners import Listener
from server.mailbox import AGAIN_SECONDS, ENDS_THE_RUN, LATE_SECONDS, Mailbox, record_of
from server.nodes import Nodes
from server.replies import back_off_of

LOST = (ErrorCode.NODE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE, ErrorCode.MESSAGE_UNAVAILABLE)
"""What Flower says where a node, or a part of its reply, did not come back."""
LEAST_BACK_OFF = 5.0
"""Seconds: a device that wants to be asked at once is not asked in an endless hurry."""


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
        self, sent: Mapping[int, Message], rows: Mapping[int, DeviceRow], phase: str
    ) -> Iterator[tuple[Entry, Message]]:
        """Sends and waits; gives the replies that carry a report, by device number, and notes the rest as errors.

        It keeps no reply that it has given away: those of a large fleet are most of the server's memory.
        """
        self.listener.phase_started(phase, len(sent))
        timeout = self.scenario.server.round_timeout
        self.nodes.forget_absent()
        reachable = {number: m for number, m in sent.items() if self.nodes.node_of(number) == m.metadata.dst_node_id}
        gone: set[int] = set()  # devices that are to be asked again, and are not there any more
        until: dict[int, float] = {}  # by device that was lost in this phase: how long it is waited for

        def postponed(number: int, reply: Message) -> float | None:
            if not self.mailbox.simulated and reply.has_error() and reply.error.code in LOST:
                return self._lost(number, until)
            return self._postponed(reply, rows[number])

        def again(number: int) -> Message | float | None:
            self._look_for_nodes()
            node = self.nodes.node_of(number)
            if node is None and time.monotonic() < until.get(number, 0.0):
                return AGAIN_SECONDS
            if node is None:
                gone.add(number)
                return None
            old = reachable[number]
            if self.aggregator and ARRAYS in old.content:
                rows[number].bytes_down += self.aggregator.record_bytes
            return Message(old.content, dst_node_id=node, message_type=old.metadata.message_type, ttl=old.metadata.ttl)

        replies = self.mailbox.send_and_wait(
            reachable,
            timeout,
            lambda number: self.listener.device_done(number, phase),
            postponed,
            again,
        )
        for number in sorted(sent):
            reply = replies.pop(number, None)
            if number not in reachable or number in gone:
                self.refuse(rows[number], "not connected")
            elif reply is None:
                self.refuse(rows[number], f"no reply within {timeout:g} s")
            else:
                with self.guarded(rows[number]):
                    self._check_answers(reply, rows[number])
                if rows[number].error is None:
                    yield self.ledger[number], reply

    def _lost(self, number: int, until: dict[int, float]) -> float | None:
        """After how many seconds a lost device is looked for; None where its time in this phase is over."""
        now, patience = time.monotonic(), self.scenario.server.reconnect_timeout
        if number not in until:
            until[number] = now + patience
            if patience:
                text = f"device {number} is lost; it is waited for, {patience:g} s at most (server.reconnect_timeout)"
                self.listener.warned(text)
        return AGAIN_SECONDS if now < until[number] else None

    def _look_for_nodes(self) -> None:
        """Greets nodes that have come back; at most once a second, however many devices are looked for."""
        if time.monotonic() - self._looked >= AGAIN_SECONDS:
            self._looked = time.monotonic()
            self.nodes.update()
        else:
            self.nodes.forget_absent()

    def _postponed(self, reply: Message, row: DeviceRow) -> float | None:
        """After how many seconds a device outside its limits is asked again; None where the reply is not about that.

        None, too, where the device has used up its waits of this round (`server.longest_back_off`), or says nonsense:
        the reply is then a failure.
        """
        try:
            found = back_off_of(reply)
        except ENDS_THE_RUN:
            raise
        except Exception:  # of any kind: the reply was made elsewhere
            return None
        left = self.scenario.server.longest_back_off - (row.backed_off_seconds or 0.0)
        if found is None or left <= 0:
            return None
        seconds = min(max(found.retry_after, LEAST_BACK_OFF), left)
        row.add_back_off_(seconds, found.reason)
        self.listener.backed_off(row.device, found.reason, seconds)
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

    def _check_answers(self, reply: Message, row: DeviceRow) -> None:
        """Raises ProtocolError for a reply that carries no report; a refusal may move the device in the ledger."""
        if reply.has_error():
            raise ProtocolError(f"Flower error {reply.error.code}: {reply.error.reason}")
        if found := back_off_of(reply):
            waited = row.backed_off_seconds or 0.0
            raise ProtocolError(f"backed off for {waited:g} s in this round (server.longest_back_off): {found.reason}")
        if "reason" in record_of(reply):
            refusal = Refusal.from_record(record_of(reply))
            self.ledger.follow_(row.device, refusal)
            raise ProtocolError(refusal.reason)
