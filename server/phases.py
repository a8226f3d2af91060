"""The two phases of a round: devices train, devices are tested. What they reply moves the ledger and fills the rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flwr.app import Message, MessageType

from lightcl.exchange.messages import ProtocolError, Tested, Trained
from lightcl.exchange.tensors import ExchangeError
from lightcl.records.rows import DeviceRow
from lightcl.scenario import Scenario
from server.aggregation import Contribution, contribution
from server.dispatch import Dispatch
from server.ledger import Entry
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
        accepted: list[tuple[Entry, Trained, int]] = []  # with the bytes that it sent
        contributions: list[Contribution] = []
        for entry, reply in self.dispatch.exchange(sent, rows, "train"):
            row, goal = rows[entry.number], goals[entry.number]
            classes = self.dispatch.ledger.classes_of(entry.number)
            try:
                checked = self.check.training(reply, entry, goal, classes)
            except (ProtocolError, ExchangeError) as error:
                self.dispatch.refuse(row, str(error))
                continue
            report = checked.report
            if self.dispatch.aggregator is None:
                self._add_training_(entry, report, checked.bytes_up, row)
            else:  # the guard needs all replies to judge one of them
                accepted.append((entry, report, checked.bytes_up))
                arrays = checked.arrays if entry.lacks_sums_of(report.task) else checked.without_sums
                if arrays:
                    images = self.dispatch.ledger.images_of(entry.number, report.task)
                    weight = float(report.examples)
                    contributions.append(
                        contribution(sent[entry.number], arrays, weight, entry.number, images, classes)
                    )
                del arrays
            if self._tests_at_once(goal):
                self._add_test_(self.check.attached_test, entry, reply, row)
            del reply, checked  # before the next reply is decoded
        if self.dispatch.aggregator is None:
            return
        outcome = self.dispatch.aggregator.update(contributions, round_number, self.dispatch.mailbox.grid)
        for entry, report, bytes_up in accepted:
            if entry.number in outcome.refused:
                self.dispatch.refuse(rows[entry.number], outcome.refused[entry.number])
                continue
            self._add_training_(entry, report, bytes_up, rows[entry.number])
            if entry.number in outcome.summed:
                entry.add_sums_(report.task)

    def _add_training_(self, entry: Entry, report: Trained, bytes_up: int, row: DeviceRow) -> None:
        entry.add_training_(report)
        row.add_training_(report)
        row.bytes_up += bytes_up

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
        try:
            report = checked(reply, entry)
        except ProtocolError as error:
            self.dispatch.refuse(row, str(error))
            return
        entry.add_test_(report)
        row.add_test_(report)
