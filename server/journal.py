"""What a run leaves on disk while it goes: rows in the run folder, and the server's state to resume from."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass

from lightcl.errors import RequestError
from lightcl.records.folder import DEVICES, ROUNDS, RunFolder
from lightcl.records.rows import Failure, RoundRow
from lightcl.storage.state import StateError
from server.aggregation import Aggregator
from server.checkpoint import Checkpoint, PendingRound, Saved, StateLost, TensorsLost
from server.ledger import Ledger
from server.listeners import Listener


@dataclass
class Journal:
    """Writes the rows of finished rounds, then the state after them: a kill in between repeats one round's end.

    `aggregator`: set as soon as it is known; None where devices share nothing.
    """

    folder: RunFolder
    checkpoint: Checkpoint
    ledger: Ledger
    aggregator: Aggregator | None = None

    def restore(self, listener: Listener) -> Saved | None:
        """The last saved point; the ledger returns to it. Of the rows only those of one unfinished round are removed.

        Where the state is lost, damaged or older than the rows, it is rebuilt from them, which is possible where the
        devices share nothing or all have finished. Raises StateError where it is not, and where rows are missing.
        """
        rounds = len(self.folder.rounds())
        try:
            saved = self._load(listener)
            problem = "is missing"
        except StateLost as error:
            saved, problem = None, f"cannot be read ({error})"
            if rounds == 0:  # nothing is lost with it
                self.checkpoint.set_aside()
        written = 0 if saved is None else saved.round - bool(saved.pending)
        # The rows of a round are written before the state after it, so a kill may leave one round more of them.
        killed = saved is not None and rounds == written + 1
        if saved and rounds > written and not (killed and self._shares):
            saved, problem = None, f"is of round {written}"
        if saved and rounds < written:
            raise StateError(
                f"{self.folder.path}: {ROUNDS} and {DEVICES} end with round {rounds}, the server's state with round "
                f"{written}; restore the rows, or start the run over with --overwrite"
            )
        if saved is None and rounds > 0:
            saved = self._rebuilt(rounds, f"{self.checkpoint.folder} {problem}")
            if not killed:
                listener.warned(
                    f"the server's state in {self.checkpoint.folder} {problem}; it was rebuilt from the rows of "
                    f"{rounds} rounds, and devices that failed are tried again"
                )
            written = rounds
        self.folder.forget_after(written)
        if saved:
            self.ledger.restore_(saved.entries)
        return saved

    def _load(self, listener: Listener) -> Saved | None:
        """The last saved point. Where its shared tensors are damaged, those before them serve.

        Within a round the run goes back and repeats it: devices answer with what they have learned, and send it again.
        Between two rounds it does not, since devices may be in the next one. Devices that have not received what is
        lost get the tensors before it, and so lose what they have learned in one round. Sums of statistics have no such
        replacement.
        """
        try:
            return self.checkpoint.load()
        except TensorsLost as error:
            if error.pending:
                self.checkpoint.go_back()
                listener.warned(f"{error}; the run goes back to those before them and repeats the round")
            elif self.ledger.scenario.method.sums_statistics:
                raise
            else:
                self.checkpoint.use_older_tensors()
                listener.warned(f"{error}; those of the round before take their place")
            return self.checkpoint.load()

    @property
    def _shares(self) -> bool:
        scenario = self.ledger.scenario
        return scenario.server.aggregation != "none" or scenario.method.sums_statistics

    def _rebuilt(self, rounds: int, problem: str) -> Saved:
        """The state after the rows of `rounds` rounds. Raises StateError where rows are not enough."""
        partition = {device: row.get("tasks") for device, row in self.folder.partition().items()}
        devices = [row for row in self.folder.devices() if row.round <= rounds]
        entries = self.ledger.rebuilt(devices, {device: tasks for device, tasks in partition.items() if tasks})
        if entries is None:
            raise StateError(
                f"{problem}, and the rows in {self.folder.path} do not fit the tasks of the devices; restore it from a "
                "backup, or start the run over with --overwrite"
            )
        scenario = self.ledger.scenario
        if self._shares and not all(entry.finished(scenario) or not entry.tasks for entry in entries):
            raise StateError(
                f"{problem}, and {ROUNDS} has rows of {rounds} rounds: the tensors that the fleet shares are lost. "
                f"Restore {self.checkpoint.folder} from a backup; or keep the rows and begin again in another folder "
                "(--out), or start the run over with --overwrite"
            )
        self.checkpoint.set_aside()
        self.checkpoint.save(rounds, None, 0, {}, entries)
        return Saved(rounds, None, 0, {}, entries)

    def note_trained(self, round_number: int, pending: PendingRound) -> None:
        """Saves a round whose training is over and whose tests are not; the shared tensors have moved in it."""
        self.ledger.changed.update(pending.rows)
        self._save(round_number, pending)

    def note_finished(self, round_number: int, finished: PendingRound, start: float) -> RoundRow:
        """Writes the rows of a round that began at `start` (`time.monotonic`); returns its own row."""
        rows = [finished.rows[number] for number in sorted(finished.rows)]
        row = RoundRow.of(rows, len(self.ledger.finished), finished.training_seconds, time.monotonic() - start)
        self.folder.append(DEVICES, rows)
        self.folder.append(ROUNDS, [row])
        self.ledger.changed.update(finished.rows)
        self._save(round_number, None)
        return row

    def note_nothing(self, round_number: int) -> None:
        """Saves that `round_number` is the last round: the one after it had begun, but no device took part."""
        self._save(round_number, None)

    def note_failure(self, reason: str) -> None:
        """Says in the run folder why the run ended; a run that could not be reopened keeps the results that it had."""
        with suppress(OSError, RequestError):  # the disk may be the reason
            if self.folder.results() is None:
                self.folder.fail(Failure(reason, self.ledger.dropped))

    def _save(self, round_number: int, pending: PendingRound | None) -> None:
        version = self.aggregator.version if self.aggregator else 0
        tensors = (self.aggregator.state() if self.aggregator else {}) if pending else None
        self.checkpoint.save(round_number, pending, version, tensors, self.ledger.take_changed_())
