"""The rounds of a run, from first to last: connect, choose, train, aggregate, test, write the rows, save."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import suppress

from flwr.serverapp import Grid

from lightcl import errors
from lightcl.assembly import build_network
from lightcl.errors import RequestError
from lightcl.exchange.messages import Instruction
from lightcl.networks.pruning import channel_digest
from lightcl.networks.weights import digest
from lightcl.records.folder import EVENTS, RunFolder
from lightcl.records.rows import DeviceRow, Failure, Results
from lightcl.scenario import Scenario
from server.aggregation import Aggregator
from server.checkpoint import Checkpoint, PendingRound, Saved
from server.connecting import Connections, NobodyConnected
from server.dispatch import Dispatch
from server.journal import Journal
from server.ledger import Entry, KnownImages, Ledger
from server.listeners import EventLog, Listener, Listeners, WarningLog
from server.mailbox import Mailbox, WorkerDied
from server.nodes import Expected, Nodes
from server.phases import Phases
from server.replies import ReplyCheck
from server.selection import Selection


class RunFailure(errors.Failure):
    """The run cannot continue; the text says why."""


class Coordinator:
    """Runs a scenario over the devices behind a grid and writes the run folder.

    Every device has its own place in its stream: each round trains the least advanced devices. A device that failed is
    only behind and is tried again, until too many failures drop it from the run (`Ledger.count_failures_`).

    `tasks[d]` are the tasks that device d learns, by the scenario's numbers (`Prepared.tasks`); None: all of them.
    `images`: those that the server knows its devices to have; None: it does not know.
    `durable`: whether the server's state survives a power cut (see Checkpoint).
    """

    def __init__(
        self,
        scenario: Scenario,
        folder: RunFolder,
        run_id: str,
        listener: Listener,
        tasks: Sequence[tuple[int, ...]] | None = None,
        *,
        images: KnownImages | None = None,
        durable: bool = True,
    ) -> None:
        self.scenario, self.folder, self.run_id = scenario, folder, run_id
        self.listener = Listeners([WarningLog(), EventLog(folder.path / EVENTS), listener])
        self.ledger, self.selection = Ledger(scenario, tasks, images), Selection(scenario)
        self._images = images
        self.round = 0
        self.aggregator: Aggregator | None = None
        self.stop = threading.Event()
        """Set from another thread, it ends the run the next time the server waits."""
        self._journal = Journal(folder, Checkpoint(folder.path / "server", durable=durable), self.ledger)

    # -- the run -----------------------------------------------------------------------------------------------

    def run(self, grid: Grid) -> Results:
        """All rounds that are left.

        Raises RunFailure where no device can be reached, or a simulation lost a worker, and anything else as it came;
        failure.json says why, unless the user stopped the run.
        """
        try:
            return self._run(grid)
        except (NobodyConnected, WorkerDied) as error:  # no device's fault: the round is not recorded, and begins again
            self._note_failure(str(error))
            raise RunFailure(str(error)) from error
        except errors.Stopped:
            raise
        except Exception as error:
            expected = isinstance(error, (errors.Failure, errors.RequestError))
            self._note_failure(str(error) if expected else f"{type(error).__name__}: {error}")
            raise
        finally:
            self._journal.checkpoint.close()

    def _run(self, grid: Grid) -> Results:
        saved = self._journal.restore(self.listener)
        self.folder.reopen()
        self.round = saved.round if saved else 0
        pending = saved.pending if saved else None
        # A run that is over and has only to be written waits for no node.
        connections = None
        if self.ledger.active or (pending and self._untested(pending)):
            connections = self._connect(grid, saved)
        elif saved and self._lacks_last_version(saved.version):
            with suppress(NobodyConnected):  # these devices have finished
                connections = self._connect(grid, saved)
        if pending:  # its training is over, so `rounds_left` does not include it
            self.listener.round_started(self.round, self.ledger.rounds_left + 1, len(pending.rows))
            self._finish_round(pending, time.monotonic() - pending.training_seconds)
        while connections and self.ledger.active:
            reachable = connections.reachable()
            if reachable:
                self.round += 1
                self._run_round(self.selection.choose(reachable, self.round))
        self._send_last_version()
        if not self.ledger.finished:
            reasons = "; ".join(sorted(set(self.ledger.dropped.values()))[:3]) or "none has images enough for a task"
            raise RunFailure(f"no device finished its stream: {reasons}")
        results = self.ledger.results(self.folder.rounds())
        self.folder.finish(results)
        return results

    def _connect(self, grid: Grid, saved: Saved | None) -> Connections:
        """Waits for the devices, then builds what the rounds need."""
        mailbox = Mailbox(grid, self.stop)
        greeting = Instruction(0, self.run_id, self.scenario.model_dump_json(), self.round, 0, 0, 0)
        expected = Expected.of(self.scenario, self._images.terms if self._images else None)
        self._nodes = Nodes(mailbox, expected, greeting, self.scenario.server.greeting_timeout)
        connections = Connections(self.scenario, mailbox, self._nodes, self.ledger, self.folder, self.listener)
        agreed = connections.connect()
        network = build_network(self.scenario, in_channels=agreed.channels, classes=agreed.classes)
        aggregator = Aggregator(self.scenario, self.scenario.method.build(network), self.listener.warned)
        if aggregator.shares:
            self.aggregator = self._journal.aggregator = aggregator
            if saved:
                aggregator.restore(saved.tensors, saved.version)
        check = ReplyCheck(self.scenario, digest(network.prefix), channel_digest(network), self.aggregator)
        dispatch = Dispatch(
            self.scenario, self.run_id, mailbox, self._nodes, self.ledger, self.listener, self.aggregator
        )
        self._phases = Phases(self.scenario, dispatch, check)
        return connections

    def _note_failure(self, reason: str) -> None:
        with suppress(OSError, RequestError):  # the disk may be the reason
            if self.folder.results() is None:  # a run that could not be reopened has the results that it had
                self.folder.fail(Failure(reason, self.ledger.dropped))

    # -- a round -----------------------------------------------------------------------------------------------

    def _run_round(self, chosen: Sequence[Entry]) -> None:
        start = time.monotonic()
        self.listener.round_started(self.round, self.ledger.rounds_left, len(chosen))
        rows = self._new_rows(chosen)
        self._phases.train_([entry for entry in chosen if not entry.only_untested(self.scenario)], rows, self.round)
        # Devices adopt the new average when they are tested. If it were not safe on disk by then, a server killed in
        # between would ask them again for tensors that they no longer have.
        pending = PendingRound(rows, time.monotonic() - start)
        self._journal.note_trained(self.round, pending)
        self._finish_round(pending, start)

    def _finish_round(self, pending: PendingRound, start: float) -> None:
        rows = pending.rows
        if untested := self._untested(pending):
            self._phases.test_(untested, rows)
        self.ledger.count_failures_(rows)
        self.listener.round_finished(self._journal.note_finished(self.round, pending, start))

    def _untested(self, pending: PendingRound) -> list[Entry]:
        """The devices of a round that have learned their task and are still to be tested on it."""
        entries = [self.ledger[number] for number, row in sorted(pending.rows.items()) if not row.error]
        return [entry for entry in entries if entry.only_untested(self.scenario)]

    def _lacks_last_version(self, version: int) -> bool:
        """Whether a device finished before the fleet's head had all sums in it."""
        sums = self.scenario.method.sums_statistics
        return sums and any(entry.version < version for entry in self.ledger.finished)

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
            self._phases.test_(late, rows)
            self.listener.round_finished(self._journal.note_finished(self.round, PendingRound(rows, 0.0), start))

    def _new_rows(self, entries: Sequence[Entry]) -> dict[int, DeviceRow]:
        return {
            e.number: DeviceRow(self.round, e.number, self._nodes.name_of(e.number), e.task, e.epochs) for e in entries
        }
