"""What a run leaves on disk while it goes: rows in the run folder, and the server's state to resume from."""

from __future__ import annotations

import time
from dataclasses import dataclass

from lightcl.records.folder import DEVICES, ROUNDS, RunFolder
from lightcl.records.rows import RoundRow
from server.aggregation import Aggregator
from server.checkpoint import Checkpoint, PendingRound, Saved
from server.ledger import Ledger


@dataclass
class Journal:
    """Writes the rows of finished rounds, then the state after them: a kill in between repeats one round's end.

    `aggregator`: set as soon as it is known; None where devices share nothing.
    """

    folder: RunFolder
    checkpoint: Checkpoint
    ledger: Ledger
    aggregator: Aggregator | None = None

    def restore(self) -> Saved | None:
        """The last saved point; the ledger returns to it, and rows of later rounds are removed."""
        saved = self.checkpoint.load()
        if saved is None:
            self.folder.forget_after(0)
            return None
        self.folder.forget_after(saved.round - 1 if saved.pending else saved.round)
        self.ledger.restore_(saved.entries)
        return saved

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

    def _save(self, round_number: int, pending: PendingRound | None) -> None:
        version = self.aggregator.version if self.aggregator else 0
        tensors = (self.aggregator.state() if self.aggregator else {}) if pending else None
        self.checkpoint.save(round_number, pending, version, tensors, self.ledger.take_changed_())
