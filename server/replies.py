"""What a device's answer must say to be taken. Whatever is wrong with it is that device's failure, nobody else's."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from flwr.app import Message

from lightcl.exchange.messages import ProtocolError, Tested, Trained
from lightcl.exchange.tensors import Arrays, check
from lightcl.scenario import Scenario
from server.aggregation import Aggregator
from server.ledger import Member
from server.nodes import arrays_of, record_of


@dataclass(frozen=True)
class AnswerCheck:
    """`prefix` and `channel_sets` are digests of the fleet's network; `aggregator` is None where nothing is shared."""

    scenario: Scenario
    prefix: str
    channel_sets: str
    aggregator: Aggregator | None

    def training(self, reply: Message, member: Member, goal: tuple[int, int]) -> tuple[Trained, Arrays]:
        """Raises ProtocolError and ExchangeError."""
        report = Trained.from_record(record_of(reply))
        _expect(report, member.number, *goal)
        if report.prefix != self.prefix:
            raise ProtocolError(f"its frozen prefix {report.prefix} is not the fleet's {self.prefix}")
        if self.aggregator and report.channel_sets != self.channel_sets:
            raise ProtocolError(
                f"device {member.number} has kept other channels ({report.channel_sets}) than the fleet "
                f"({self.channel_sets}), so its tensors are not averaged: it pruned other weights than the server"
            )
        if report.examples <= 0 or not np.isfinite(report.loss):
            raise ProtocolError(f"{report.examples} examples with a loss of {report.loss}")
        arrays = arrays_of(reply)
        finished = report.epochs == self.scenario.training.epochs
        check(arrays, self.aggregator.shapes(finished) if self.aggregator else {})
        return report, arrays

    def test(self, reply: Message, member: Member) -> Tested:
        """Raises ProtocolError."""
        report = Tested.from_record(record_of(reply))
        _expect(report, member.number, member.task, member.epochs)
        tested = member.task + 1
        cil = tested if "cil" in self.scenario.settings else 0
        if (len(report.til), len(report.cil), len(report.images)) != (tested, cil, tested):
            raise ProtocolError(
                f"a test of {len(report.til)} tasks (TIL) and {len(report.cil)} (CIL), asked for {tested} and {cil}"
            )
        if not all(0 <= accuracy <= 1 for accuracy in [*report.til, *report.cil]):
            raise ProtocolError("an accuracy outside 0..1")
        return report


def _expect(report: Trained | Tested, device: int, task: int, epochs: int) -> None:
    said, asked = (report.device, report.task, report.epochs), (device, task, epochs)
    if said != asked:
        raise ProtocolError(f"speaks of (device, task, epoch) {said}, asked for {asked}")
