"""The two phases of a round: devices train, devices are tested. What they reply moves the ledger and fills the rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from flwr.app import Message, MessageType

from lightcl.errors import one_line
from lightcl.exchange.messages import Tested
from lightcl.records.rows import DeviceRow
from lightcl.scenario import Scenario
from server.aggregation import Aggregator, Contribution, contribution
from server.dispatch import Dispatch
from server.ledger import Entry
from server.mailbox import ENDS_THE_RUN
from server.replies import ReplyCheck

Rows = dict[int, DeviceRow]


@dataclass(frozen=True)
class Phases:
    """The phases of the rounds of one run. `rows` in its methods are the rows of the present round, by device."""

    scenario: Scenario
    dispatch: Dispatch
    check: ReplyCheck

    def train_(self, chosen: Sequence[Entry], rows: Rows, round_number: int) -> None:
        """Every chosen device trains until its goal; then the shared tensors move.

        Where nothing is shared, a device that finishes its task is tested in the same message.
        """
        goals = {entry.number: entry.goal(self.scenario) for entry in chosen}
        sent = {
            entry.number: self.dispatch.message(
                entry,
                MessageType.TRAIN,
                goals[entry.number],
                rows[entry.number],
                evaluate=self._tests_at_once(goals[entry.number]),
            )
            for entry in chosen
        }
        contributions: list[Contribution] = []
        for entry, reply in self.dispatch.exchange(sent, rows, "train"):
            row, goal = rows[entry.number], goals[entry.number]
            with self.dispatch.guarded(row):
                contributions += self._add_training_(reply, sent[entry.number], entry, row, goal)
            if row.error is None and self._tests_at_once(goal):
                self._add_test_(self.check.attached_test, entry, reply, row)
            del reply  # before the next reply is decoded
        if self.dispatch.aggregator is not None:
            self._aggregate_(self.dispatch.aggregator, contributions, round_number)

    def _add_training_(
        self, reply: Message, instruction: Message, entry: Entry, row: DeviceRow, goal: tuple[int, int]
    ) -> list[Contribution]:
        """What the reply gives to the average. Whatever can go wrong with it does so before anything has changed."""
        accepted = self.check.training(reply, entry, goal)
        report, weight = accepted.report, float(accepted.report.examples)
        all_arrays = contribution(instruction, accepted.arrays, weight) if accepted.arrays else None
        row.add_training_(report)
        row.bytes_up += accepted.bytes_up
        new_sums = entry.add_training_(report, self.check.finishes_task(report))
        given = all_arrays if new_sums or all_arrays is None else replace(all_arrays, sums={})
        return [given] if given and (given.reply or given.sums) else []

    def _aggregate_(self, aggregator: Aggregator, contributions: Sequence[Contribution], round_number: int) -> None:
        try:
            aggregator.update(contributions, round_number, self.dispatch.mailbox.grid)
        except ENDS_THE_RUN:
            raise
        except Exception as error:  # Flower's strategies have their own kinds, and replies may be made to raise them
            aggregator.version += 1  # a part of the tensors may have moved
            why = one_line(f"{type(error).__name__}: {error}")
            self.dispatch.listener.warned(
                f"round {round_number}: the replies cannot be averaged ({why}); the shared tensors stay as they are"
            )

    def test_(self, entries: Sequence[Entry], rows: Rows) -> None:
        """Every given device is tested where it stands."""
        if not entries:
            return
        sent = {
            entry.number: self.dispatch.message(
                entry, MessageType.EVALUATE, (entry.task, entry.epochs), rows[entry.number]
            )
            for entry in entries
        }
        for entry, reply in self.dispatch.exchange(sent, rows, "evaluate"):
            self._add_test_(self.check.test, entry, reply, rows[entry.number])

    def _tests_at_once(self, goal: tuple[int, int]) -> bool:
        """Whether nothing happens between the training and the test, so that one message does for both."""
        return self.dispatch.aggregator is None and goal[1] == self.scenario.training.epochs

    def _add_test_(
        self, checked: Callable[[Message, Entry], Tested], entry: Entry, reply: Message, row: DeviceRow
    ) -> None:
        with self.dispatch.guarded(row):
            report = checked(reply, entry)
            entry.add_test_(report)
            row.add_test_(report)
