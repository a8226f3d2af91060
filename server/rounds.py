"""The rounds of a run, from first to last: connect, choose, train, aggregate, test, write the rows, save."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import suppress

from flwr.serverapp import Grid

from lightcl import errors
from lightcl.records.folder import EVENTS, RunFolder
from lightcl.records.rows import Results
from lightcl.scenario import Scenario
from server.aggregation import Aggregator
from server.checkpoint import Checkpoint, PendingRound, Saved
from server.connecting import NobodyConnected
from server.journal import Journal
from server.ledger import Entry, KnownImages, Ledger
from server.listeners import EventLog, Listener, Listeners, WarningLog
from server.mailbox import WorkerDied
from server.selection import Selection
from server.session import Session


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
            self._journal.note_failure(str(error))
            raise RunFailure(str(error)) from error
        except errors.Stopped:
            raise
        except Exception as error:
            expected = isinstance(error, (errors.Failure, errors.RequestError))
            self._journal.note_failure(str(error) if expected else f"{type(error).__name__}: {error}")
            raise
        finally:
            self._journal.checkpoint.close()

    def _run(self, grid: Grid) -> Results:
        saved = self._journal.restore(self.listener)
        self.folder.reopen()
        self.round = saved.round if saved else 0
        pending = saved.pending if saved else None
        # A run that is over and has only to be written waits for no node.
        session = None
        if self.ledger.active or (pending and self._untested(pending)):
            session = self._connect(grid, saved)
        elif saved and self.ledger.without_version(saved.version):
            with suppress(NobodyConnected):  # these devices have finished
                session = self._connect(grid, saved)
        if pending:  # its training is over, so `rounds_left` does not include it
            self.listener.round_started(self.round, self.ledger.rounds_left + 1, len(pending.rows))
            self._finish_round(session, pending, time.monotonic() - pending.training_seconds)
        while session and self.ledger.active:
            reachable = session.connections.reachable()
            if reachable:
                self.round += 1
                self._run_round(session, self.selection.choose(reachable, self.round))
        if session:
            self._send_last_version(session)
        if not self.ledger.finished:
            reasons = "; ".join(sorted(set(self.ledger.dropped.values()))[:3]) or "none has images enough for a task"
            raise RunFailure(f"no device finished its stream: {reasons}")
        results = self.ledger.results(self.folder.rounds())
        self.folder.finish(results)
        return results

    def _connect(self, grid: Grid, saved: Saved | None) -> Session:
        session = Session.open(grid, self.run_id, self.ledger, self.folder, self.listener, self.stop, saved)
        self.aggregator = self._journal.aggregator = session.aggregator
        return session

    # -- a round -----------------------------------------------------------------------------------------------

    def _run_round(self, session: Session, chosen: Sequence[Entry]) -> None:
        start = time.monotonic()
        self.listener.round_started(self.round, self.ledger.rounds_left, len(chosen))
        rows = session.new_rows(chosen, self.round)
        to_train = [entry for entry in chosen if not entry.only_untested(self.scenario)]
        session.phases.train_(to_train, rows, self.round)
        if not rows:  # all devices wait for images: nothing has happened, so the round begins again
            self.round -= 1
            return
        # Devices adopt the new average when they are tested. If it were not safe on disk by then, a server killed in
        # between would ask them again for tensors that they no longer have.
        pending = PendingRound(rows, time.monotonic() - start)
        self._journal.note_trained(self.round, pending)
        self._finish_round(session, pending, start)

    def _finish_round(self, session: Session | None, pending: PendingRound, start: float) -> None:
        """The second half of a round; without a session there is nothing to test in it."""
        if session and (untested := self._untested(pending)):
            session.phases.test_(untested, pending.rows)
        self.ledger.count_failures_(pending.rows)
        self._record(pending, start)

    def _record(self, finished: PendingRound, start: float) -> None:
        """The end of a round that began at `start`; one that no device took part in begins again."""
        if finished.rows:
            self.listener.round_finished(self._journal.note_finished(self.round, finished, start))
            return
        self.round -= 1
        self._journal.note_nothing(self.round)

    def _untested(self, pending: PendingRound) -> list[Entry]:
        """The devices of a round that have learned their task and are still to be tested on it."""
        entries = [self.ledger[number] for number, row in sorted(pending.rows.items()) if not row.error]
        return [entry for entry in entries if entry.only_untested(self.scenario)]

    def _send_last_version(self, session: Session) -> None:
        """Tests devices again that finished before the fleet's head had all sums in it: it is their head, too."""
        late = self.ledger.without_version(self.aggregator.version) if self.aggregator else []
        if late:
            start = time.monotonic()
            self.round += 1
            self.listener.round_started(self.round, 1, len(late))
            rows = session.new_rows(late, self.round)
            session.phases.test_(late, rows)
            self._record(PendingRound(rows, 0.0), start)
