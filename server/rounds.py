"""The rounds of a run, from first to last: connect, choose, train, aggregate, test, book, resume."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from flwr.app import MessageType
from flwr.serverapp import Grid
from torch import Tensor

from lightcl import errors
from lightcl.assembly import build_network
from lightcl.exchange.messages import Greeting, Instruction, ProtocolError
from lightcl.exchange.tensors import ExchangeError
from lightcl.networks.pruning import channel_digest
from lightcl.networks.weights import digest
from lightcl.records.folder import DEVICES, EVENTS, ROUNDS, RunFolder
from lightcl.records.rows import DeviceRow, Failure, Results, RoundRow
from lightcl.scenario import Scenario
from lightcl.storage.state import StateFolder
from server.aggregation import Aggregator, Contribution, contribution
from server.connecting import Connecting, NobodyConnected
from server.dispatch import Dispatch
from server.ledger import Entry, Ledger
from server.listeners import EventLog, Listener, Listeners, WarningLog
from server.mailbox import Mailbox, WorkerDied
from server.nodes import Nodes
from server.replies import ReplyCheck
from server.selection import Selection


class RunFailure(errors.Failure):
    """The run cannot continue; the text says why."""


@dataclass(frozen=True)
class PendingRound:
    """A round between training and testing: its devices' rows so far."""

    rows: dict[int, DeviceRow]
    training_seconds: float


class Coordinator:
    """Runs a scenario over the devices behind a grid and writes the run folder.

    Every device has its own place in its stream: each round trains the least advanced devices. A device that failed is
    only behind and is tried again, until `max_failures` failures in a row drop it from the run.
    """

    def __init__(self, scenario: Scenario, folder: RunFolder, run_id: str, listener: Listener) -> None:
        self.scenario, self.folder, self.run_id = scenario, folder, run_id
        self.listener = Listeners([WarningLog(), EventLog(folder.path / EVENTS), listener])
        self.ledger, self.selection = Ledger(scenario), Selection(scenario)
        self.round = 0
        self.aggregator: Aggregator | None = None
        self.stop = threading.Event()
        """Set from another thread, it ends the run the next time the server waits."""
        self._state = StateFolder(folder.path / "server")
        self._restored: tuple[dict[str, Tensor], int] | None = None

    # -- the run -----------------------------------------------------------------------------------------------

    def run(self, grid: Grid) -> Results:
        """All rounds that are left. Raises RunFailure where no device can be reached, or a simulation lost a worker."""
        self.folder.reopen()
        try:
            return self._run(grid)
        except (NobodyConnected, WorkerDied) as error:  # no device's fault: the round is not booked, and begins again
            self._fail(str(error))

    def _run(self, grid: Grid) -> Results:
        pending = self._restore()
        connecting = self._connect(grid)
        if pending:  # the one round whose training is over, so `rounds_left` does not include it
            self.listener.round_started(self.round, self.ledger.rounds_left + 1, len(pending.rows))
            self._finish_round(pending, time.monotonic() - pending.training_seconds)
        while self.ledger.active:
            reachable = connecting.reachable()
            if reachable:
                self.round += 1
                self._run_round(self.selection.choose(reachable, self.round))
        self._send_last_version()
        finished = [entry.rows for entry in self.ledger.finished]
        if not finished:
            self._fail(f"no device finished its stream: {'; '.join(sorted(set(self.ledger.dropped.values()))[:3])}")
        results = Results.of(
            finished, self.scenario.stream.tasks, devices=len(self.ledger), dropped=self.ledger.dropped,
            rounds=self.folder.rounds(),
        )  # fmt: skip
        self.folder.finish(results)
        return results

    def _connect(self, grid: Grid) -> Connecting:
        mailbox = Mailbox(grid, self.stop)
        greeting = Instruction(0, self.run_id, self.scenario.model_dump_json(), self.round, 0, 0, 0)
        self._nodes = Nodes(mailbox, len(self.ledger), greeting)
        connecting = Connecting(self.scenario, mailbox, self._nodes, self.ledger, self.folder, self.listener)
        connecting.connect()
        assert self._nodes.agreed is not None
        self._build_network(self._nodes.agreed)
        self._dispatch = Dispatch(
            self.scenario, self.run_id, mailbox, self._nodes, self.ledger, self.listener, self.aggregator
        )
        return connecting

    def _build_network(self, greeting: Greeting) -> None:
        network = build_network(self.scenario, in_channels=greeting.channels, classes=greeting.classes)
        aggregator = Aggregator(self.scenario.server, self.scenario.method.build(network))
        if aggregator.shares:
            self.aggregator = aggregator
            if self._restored:
                self.aggregator.restore(*self._restored)
        self._check = ReplyCheck(self.scenario, digest(network.prefix), channel_digest(network), self.aggregator)

    def _fail(self, reason: str) -> NoReturn:
        self.folder.fail(Failure(reason, self.ledger.dropped))
        raise RunFailure(reason)

    # -- a round -----------------------------------------------------------------------------------------------

    def _run_round(self, chosen: Sequence[Entry]) -> None:
        start = time.monotonic()
        self.listener.round_started(self.round, self.ledger.rounds_left, len(chosen))
        rows = self._new_rows(chosen)
        self._train([entry for entry in chosen if not entry.only_untested(self.scenario)], rows)
        # Devices adopt the new average when they are tested. If it were not safe on disk by then, a server killed in
        # between would ask them again for tensors that they no longer have.
        pending = PendingRound(rows, time.monotonic() - start)
        self._save(pending)
        self._finish_round(pending, start)

    def _train(self, chosen: Sequence[Entry], rows: dict[int, DeviceRow]) -> None:
        goals = {entry.number: entry.goal(self.scenario) for entry in chosen}
        sent = {e.number: self._dispatch.message(e, MessageType.TRAIN, goals[e.number], rows[e.number]) for e in chosen}
        contributions: list[Contribution] = []
        for entry, reply in self._dispatch.exchange(sent, rows, "train"):
            row = rows[entry.number]
            try:
                accepted = self._check.training(reply, entry, goals[entry.number])
            except (ProtocolError, ExchangeError) as error:
                self._dispatch.refuse(row, str(error))
                continue
            report = accepted.report
            row.add_training_(report)
            row.bytes_up += accepted.bytes_up
            new_sums = entry.add_training_(report, self._check.finishes_task(report))
            arrays = accepted.arrays if new_sums else accepted.without_sums
            if arrays:
                contributions.append(contribution(sent[entry.number], arrays, float(report.examples)))
            del reply, accepted, arrays  # before the next reply is decoded
        if self.aggregator is not None:
            self.aggregator.update(contributions, self.round, self._dispatch.mailbox.grid)

    def _finish_round(self, pending: PendingRound, start: float) -> None:
        rows = pending.rows
        entries = [self.ledger[number] for number in sorted(rows)]
        self._test([e for e in entries if not rows[e.number].error and e.only_untested(self.scenario)], rows)
        self.ledger.count_failures_(rows)
        self._book(pending, start)

    def _test(self, testable: Sequence[Entry], rows: dict[int, DeviceRow]) -> None:
        if not testable:
            return
        sent = {
            e.number: self._dispatch.message(e, MessageType.EVALUATE, (e.task, e.epochs), rows[e.number])
            for e in testable
        }
        for entry, reply in self._dispatch.exchange(sent, rows, "evaluate"):
            try:
                report = self._check.test(reply, entry)
            except ProtocolError as error:
                self._dispatch.refuse(rows[entry.number], str(error))
                continue
            entry.add_test_(report)
            rows[entry.number].add_test_(report)

    def _send_last_version(self) -> None:
        """Tests devices again that finished before the fleet's head had all sums in it: it is their head, too."""
        if self.aggregator is None or not self.aggregator.sums:
            return
        late = [entry for entry in self.ledger.finished if entry.version < self.aggregator.version]
        if late:
            start = time.monotonic()
            self.round += 1
            self.listener.round_started(self.round, 1, len(late))
            rows = self._new_rows(late)
            self._test(late, rows)
            self._book(PendingRound(rows, 0.0), start)

    def _new_rows(self, entries: Sequence[Entry]) -> dict[int, DeviceRow]:
        return {
            e.number: DeviceRow(self.round, e.number, self._nodes.name_of(e.number), e.task, e.epochs) for e in entries
        }

    # -- records -----------------------------------------------------------------------------------------------

    def _book(self, finished: PendingRound, start: float) -> None:
        """Writes the rows of a finished round, then the state after it."""
        rows = [finished.rows[number] for number in sorted(finished.rows)]
        row = RoundRow.of(rows, len(self.ledger.finished), finished.training_seconds, time.monotonic() - start)
        self.folder.append(DEVICES, rows)
        self.folder.append(ROUNDS, [row])
        self._save(None)
        self.listener.round_finished(row)

    def _save(self, pending: PendingRound | None) -> None:
        values = {
            "round": self.round,
            "pending": pending and {
                "rows": [row.to_json() for row in pending.rows.values()], "training_seconds": pending.training_seconds
            },
            "version": self.aggregator.version if self.aggregator else 0,
            "ledger": self.ledger.to_saved(),
        }  # fmt: skip
        self._state.save(self.aggregator.state() if self.aggregator else {}, values)

    def _restore(self) -> PendingRound | None:
        """Returns to the last saved point; a round whose training was over by then is returned as pending."""
        stored = self._state.load()
        if stored is None:
            self.folder.forget_after(0)
            return None
        tensors, values = stored
        pending = None
        self.round = values["round"]
        if values["pending"]:
            rows = [DeviceRow.from_json(row, "server/state.json") for row in values["pending"]["rows"]]
            pending = PendingRound({row.device: row for row in rows}, values["pending"]["training_seconds"])
        self.folder.forget_after(self.round - 1 if pending else self.round)
        self.ledger.restore_(values["ledger"])
        self._restored = (tensors, values["version"])
        return pending
