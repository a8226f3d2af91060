"""The two phases of a round: devices train, devices are tested. What they reply moves the ledger and fills the rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from flwr.app import Message, MessageType

from lightcl.errors import one_line
from lightcl.exchange.messages import Telemetry, Tested, Trained
from lightcl.records.rows import DeviceRow
from lightcl.scenario import Scenario
from server.aggregation import Aggregator, Contribution, Outcome, contribution
from server.dispatch import Dispatch
from server.ledger import Entry
from server.mailbox import ENDS_THE_RUN
from server.replies import AcceptedTraining, ReplyCheck, notice_of, telemetry_of

Rows = dict[int, DeviceRow]


@dataclass(frozen=True)
class Phases:
    """The phases of the rounds of one run. `rows` in its methods are the rows of the present round, by device."""

    scenario: Scenario
    dispatch: Dispatch
    check: ReplyCheck
    _noticed: list[str] = field(default_factory=list)

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
            for entry in self.dispatch.ledger.longest_first(chosen, {n: goal[:1] for n, goal in goals.items()})
        }
        accepted: list[tuple[Entry, Trained, int, Telemetry | None]] = []  # with the bytes that it sent
        contributions: list[Contribution] = []

        def read(entry: Entry, reply: Message) -> AcceptedTraining:
            classes = self.dispatch.ledger.classes_of(entry.number)
            return self.check.training(reply, entry, goals[entry.number], classes)

        for entry, reply, training in self.dispatch.exchange(sent, rows, "train", read):
            row, goal = rows[entry.number], goals[entry.number]
            with self.dispatch.guarded(row):
                checked = training()
                telemetry = self._telemetry(reply, entry)
                if self.dispatch.aggregator is None:
                    self._add_training_(entry, checked.report, checked.bytes_up, telemetry, row)
                else:  # its guard needs all replies to judge one of them
                    contributions += self._contribution(checked, sent[entry.number], entry)
                    accepted.append((entry, checked.report, checked.bytes_up, telemetry))
            self._pass_on_notice(reply, entry)
            if row.error is None and self._tests_at_once(goal):
                self._add_test_(partial(self.check.attached_test, reply, entry), entry, row)
        if self.dispatch.aggregator is None:
            return
        outcome = self._aggregate_(self.dispatch.aggregator, contributions, round_number)
        for entry, report, bytes_up, telemetry in accepted:
            if entry.number in outcome.refused:
                self.dispatch.refuse(rows[entry.number], outcome.refused[entry.number])
                continue
            self._add_training_(entry, report, bytes_up, telemetry, rows[entry.number])
            if entry.number in outcome.summed:
                entry.add_sums_(report.task)

    def _contribution(self, checked: AcceptedTraining, instruction: Message, entry: Entry) -> list[Contribution]:
        """What a reply gives to the shared tensors, if anything."""
        report = checked.report
        arrays = checked.arrays if entry.lacks_sums_of(report.task) else checked.without_sums
        if not arrays:
            return []
        images = self.dispatch.ledger.images_of(entry.number, report.task)
        return [contribution(instruction, arrays, float(report.examples), entry.number, images)]

    def _aggregate_(self, aggregator: Aggregator, contributions: Sequence[Contribution], round_number: int) -> Outcome:
        """Moves the shared tensors; where that fails, they stay, and no reply is to blame for it."""
        try:
            return aggregator.update(contributions, round_number, self.dispatch.mailbox.grid)
        except ENDS_THE_RUN:
            raise
        except Exception as error:  # Flower's strategies have their own kinds, and replies may be made to raise them
            aggregator.version += 1  # a part of the tensors may have moved
            why = one_line(f"{type(error).__name__}: {error}")
            self.dispatch.listener.warned(
                f"round {round_number}: the replies cannot be averaged ({why}); the shared tensors stay as they are"
            )
            return Outcome()

    def _add_training_(
        self, entry: Entry, report: Trained, bytes_up: int, telemetry: Telemetry | None, row: DeviceRow
    ) -> None:
        entry.add_training_(report)
        row.add_training_(report)
        row.bytes_up += bytes_up
        if telemetry:
            row.add_telemetry_(telemetry)

    def _telemetry(self, reply: Message, entry: Entry) -> Telemetry | None:
        """What a board's sensors said; where it cannot be used it is left out, and the reply is as good without it."""
        try:
            return telemetry_of(reply)
        except ENDS_THE_RUN:
            raise
        except Exception as error:  # of any kind: the reply was made elsewhere
            self.dispatch.listener.warned(one_line(f"device {entry.number}: its telemetry is dropped ({error})"))
            return None

    def _pass_on_notice(self, reply: Message, entry: Entry) -> None:
        """Warns once of what a device wants its user to know: the devices of a machine would all say it."""
        if self._noticed:
            return
        try:
            text = notice_of(reply)
        except ENDS_THE_RUN:
            raise
        except Exception:  # of any kind: the reply was made elsewhere, and is as good without it
            return
        if text:
            self._noticed.append(text)
            self.dispatch.listener.warned(f"device {entry.number}: {text} (said once)")

    def test_(self, entries: Sequence[Entry], rows: Rows) -> None:
        """Every given device is tested where it stands."""
        if not entries:
            return
        learned = {entry.number: entry.tasks[: entry.position + 1] for entry in entries}
        sent = {
            entry.number: self.dispatch.message(
                entry, MessageType.EVALUATE, (entry.task, entry.epochs), rows[entry.number]
            )
            for entry in self.dispatch.ledger.longest_first(entries, learned)
        }

        def read(entry: Entry, reply: Message) -> Tested:
            return self.check.test(reply, entry)

        for entry, reply, test in self.dispatch.exchange(sent, rows, "evaluate", read):
            self._add_test_(test, entry, rows[entry.number])
            self._pass_on_notice(reply, entry)

    def _tests_at_once(self, goal: tuple[int, int]) -> bool:
        """Whether nothing happens between the training and the test, so that one message does for both."""
        return self.dispatch.aggregator is None and goal[1] == self.scenario.training.epochs

    def _add_test_(self, test: Callable[[], Tested], entry: Entry, row: DeviceRow) -> None:
        with self.dispatch.guarded(row):
            report = test()
            entry.add_test_(report)
            row.add_test_(report)
