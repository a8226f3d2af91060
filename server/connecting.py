"""Waiting for devices: until all are connected at the start of a run, and until one is in its course."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from lightcl.data.sources import comes_to_boards
from lightcl.errors import one_line, shown
from lightcl.exchange.messages import Greeting
from lightcl.records.folder import RunFolder
from lightcl.scenario import Scenario
from server.ledger import Entry, Ledger
from server.listeners import Listener
from server.mailbox import Mailbox
from server.nodes import Nodes

MOST_PROBLEMS = 5
"""Problems of nodes that an error lists."""


class NobodyConnected(Exception):
    """No device can be reached; the text says how long the server waited, and what is wrong with nodes."""


@dataclass
class Connections:
    """Waits for the nodes of devices, within the time limits of the scenario's section `server`."""

    scenario: Scenario
    mailbox: Mailbox
    nodes: Nodes
    ledger: Ledger
    folder: RunFolder
    listener: Listener
    _warned: set[str] = field(default_factory=set)
    _own_data: set[int] = field(default_factory=set)
    _away: dict[int, float | None] = field(default_factory=dict)
    """Since when each device that was once connected is not; None while it is."""

    def connect(self) -> Greeting:
        """Waits for the nodes of all devices that still have to learn, `server.connect_timeout` at most.

        The devices of a simulation are there, so it waits for all of them: otherwise the load of the machine would
        decide the numbers. Returns what the nodes agree on. Raises NobodyConnected where none has come by then, and in
        a simulation where one is missing.
        """
        limit, start = self.scenario.server.connect_timeout, time.monotonic()
        wanted, shown = self.ledger.active, -1
        while True:
            self._update()
            missing = [entry for entry in wanted if self.nodes.node_of(entry.number) is None]
            connected = len(wanted) - len(missing)
            if connected != shown:
                self.listener.connected(connected, len(wanted))
                shown = connected
            if self.nodes.agreed and not missing and not self.nodes.awaited:
                break
            nobody = self.nodes.agreed is None or bool(wanted and not connected)
            if self._given_up(start, nobody):
                break
            self.mailbox.pause(0.2)
        problems = self.nodes.problems
        more = [f"; and {len(problems) - MOST_PROBLEMS} more"] if len(problems) > MOST_PROBLEMS else []
        about = "".join([*(f"; {problem}" for problem in problems[:MOST_PROBLEMS]), *more])
        waited = f"after {limit:g} s (server.connect_timeout){about}"
        if self.nodes.agreed is None or (wanted and not connected):
            raise NobodyConnected(f"none of {len(wanted)} devices is connected {waited}")
        if missing and self.mailbox.simulated:
            raise NobodyConnected(f"{len(missing)} of {len(wanted)} simulated devices are not connected {waited}")
        for entry in missing:  # they take part as soon as they are connected
            self.listener.refused(entry.number, one_line(f"not connected {waited}"))
        self.nodes.settle()
        return self.nodes.agreed

    def reachable(self) -> list[Entry]:
        """The connected devices that still have to learn; waits for one, and drops those that stay away.

        Where all devices take part in a round, it waits for those that have just been lost as well: they would miss it.
        Boards whose images come with time may be off for days: they are waited for without end.
        """
        start = time.monotonic()
        while True:
            self._update()
            active = self.ledger.active
            connected = [entry for entry in active if self.nodes.node_of(entry.number) is not None]
            if not active or (connected and not self._lost(active)):
                return connected
            if self._given_up(start, nobody=True):
                if comes_to_boards(self.scenario.data.source):
                    self._warn("no device is connected; the server waits for one without end (data.source: field)")
                    self.mailbox.pause(1)
                    continue
                for entry in active:
                    entry.dropped = f"not connected for {self.scenario.server.connect_timeout:g} s"
                    self.listener.refused(entry.number, entry.dropped)
                return []
            self.mailbox.pause(1)

    def _lost(self, active: Sequence[Entry]) -> bool:
        """Whether to wait for a device that was connected until `server.reconnect_timeout` seconds ago."""
        section, now, waits = self.scenario.server, time.monotonic(), False
        for number in [entry.number for entry in active]:
            if self.nodes.node_of(number) is not None:
                self._away[number] = None
            elif number in self._away:
                since = self._away[number] = self._away[number] or now
                waits |= now - since < section.reconnect_timeout
        return waits and section.fraction == 1 and not self.mailbox.simulated

    def _update(self) -> None:
        self.nodes.update()
        own = self.nodes.own_data if self.nodes.settled else {}
        if new := own.keys() - self._own_data:
            for device in new:
                self.ledger.set_tasks_(device, own[device])
            learned = {device: self.ledger[device].tasks for device in new}  # of a resumed run: those it began with
            every = self.scenario.stream.tasks
            self.folder.note_own_data(new, {d: tasks for d, tasks in learned.items() if len(tasks) < every})
            self._own_data |= new
            if self.ledger.terms:  # the server has images, too, and only the devices say that theirs are others
                self._warn(
                    f"devices with images of their own (own-data): {shown(sorted(new))}. What the server knows of "
                    "their images is not used: they count at most as twice the median of a round"
                )
        if self.nodes.settled or not self.nodes.awaited:  # before that the next greeting may turn the majority
            for problem in self.nodes.problems:  # also where no device is missing because of it
                self._warn(problem)

    def _given_up(self, start: float, nobody: bool) -> bool:
        """Whether to stop waiting, since `start`. `nobody`: no device at all can be reached.

        A board that is connected and does not reply may be at work on an earlier message: it is waited for as long as a
        round may take. Where devices have finished, one that has never replied does not hold back their results.
        """
        section, waited = self.scenario.server, time.monotonic() - start
        if self.mailbox.simulated and (self.nodes.unanswered or not self.nodes.problems):
            return waited > max(section.connect_timeout, section.round_timeout)
        if waited <= section.connect_timeout:
            return False
        at_work = self.nodes.busy if self.ledger.finished else self.nodes.unanswered
        if not nobody or not at_work:
            return True
        self._warn(
            f"{self.nodes.unanswered} nodes are connected but have not replied; they may be at work on an earlier "
            f"message. The server waits for them, {section.round_timeout:g} s at most (server.round_timeout)"
        )
        return waited > section.round_timeout

    def _warn(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            self.listener.warned(text)
