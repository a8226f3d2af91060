"""The rounds of a run: who trains what, what comes back, what is refused, and where a killed run goes on."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import NoReturn, Protocol

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from lightcl.assembly import build_network
from lightcl.errors import Failure
from lightcl.exchange.messages import ARRAYS, INSTRUCTION, Greeting, Instruction, ProtocolError, Refusal
from lightcl.exchange.tensors import STATISTICS, ExchangeError, size_in_bytes, split
from lightcl.networks.pruning import channel_digest
from lightcl.networks.weights import digest
from lightcl.records.folder import RunFolder
from lightcl.records.rows import Row, add_test_, add_training_, device_row, round_row, run_results
from lightcl.scenario import Scenario
from lightcl.seeds import numpy_generator
from lightcl.storage.state import StateFolder
from server.aggregation import Aggregator, Contribution, contribution
from server.ledger import Member
from server.nodes import Fleet, WorkerDied, record_of
from server.replies import AnswerCheck

logger = logging.getLogger("flwr")


class RunFailure(Failure):
    """The run cannot go on; the text says why."""


class Listener(Protocol):
    """Whoever wants to watch a run."""

    def connected(self, devices: int, wanted: int) -> None: ...
    def round_started(self, number: int, rounds_left: int, devices: int) -> None: ...
    def device_done(self, device: int, phase: str) -> None: ...
    def phase_started(self, phase: str, devices: int) -> None: ...
    def round_finished(self, row: Row) -> None: ...
    def refused(self, device: int, reason: str) -> None: ...


@dataclass(frozen=True)
class Pending:
    """A round between training and testing: its devices' rows so far."""

    rows: dict[int, Row]
    training_seconds: float


class Coordinator:
    """Runs a scenario over the devices behind a grid and writes the run folder.

    A device's place in its stream is its own: each round trains the least advanced devices, and one that failed is
    simply behind and tried again, until `max_failures` in a row put it out of the run.
    """

    def __init__(self, scenario: Scenario, folder: RunFolder, run: str, listener: Listener) -> None:
        self.scenario, self.folder, self.run_id, self.listener = scenario, folder, run, listener
        self.members = [Member(number, scenario.first_task) for number in range(scenario.fleet.devices)]
        self.round = 0
        self._state = StateFolder(folder.path / "server")
        self._scenario_json = scenario.model_dump_json()
        self.aggregator: Aggregator | None = None
        self._restored: tuple[dict[str, Tensor], int] | None = None
        self._warned: set[str] = set()
        self._own_data: set[int] = set()
        self.stop = threading.Event()
        """Set from another thread, it ends the run at the next look at the grid."""

    # -- the run -----------------------------------------------------------------------------------------------

    def run(self, grid: Grid) -> Row:
        """All rounds that are left; returns the results.

        Raises RunFailure where no device can be asked any more, or where a simulation has lost a worker.
        """
        self.folder.reopen()
        try:
            return self._run(grid)
        except WorkerDied as error:  # no device's fault: the round is not booked, and a resumed run begins it again
            self._fail(str(error))

    def _run(self, grid: Grid) -> Row:
        pending = self._restore()
        greeting = Instruction(0, self.run_id, self._scenario_json, self.round, 0, 0, 0)
        fleet = Fleet(grid, len(self.members), greeting, self.stop)
        self._connect(fleet)
        if pending:  # the one round whose training is over, so that `_rounds_left` counts it no more
            self.listener.round_started(self.round, self._rounds_left() + 1, len(pending.rows))
            self._finish_round(fleet, pending, time.monotonic() - pending.training_seconds)
        while self._active():
            reachable = self._reachable(fleet)
            if reachable:
                self.round += 1
                self._run_round(fleet, self._choose(reachable))
        self._hand_out_last_version(fleet)
        results = self._results()
        if not results["devices_finished"]:
            reasons = sorted({m.dropped for m in self.members})
            self._fail(f"no device finished its stream: {'; '.join(reasons[:3])}")
        self.folder.finish(results)
        return results

    def _hand_out_last_version(self, fleet: Fleet) -> None:
        """Tests those again that were finished before the fleet's head had all sums in it; it is theirs, too."""
        if self.aggregator is None or not self.aggregator.sums:
            return
        late = [m for m in self.members if m.finished(self.scenario) and m.version < self.aggregator.version]
        if late:
            start = time.monotonic()
            self.round += 1
            self.listener.round_started(self.round, 1, len(late))
            rows = {m.number: device_row(self.round, m.number, fleet.name_of(m.number), m.task, m.epochs) for m in late}
            self._test(fleet, late, rows)
            self._book(Pending(rows, 0.0), start)

    def _active(self) -> list[Member]:
        return [m for m in self.members if not m.dropped and not m.finished(self.scenario)]

    def _fail(self, reason: str) -> NoReturn:
        self.folder.fail(reason, {str(m.number): m.dropped for m in self.members if m.dropped})
        raise RunFailure(reason)

    def _choose(self, active: Sequence[Member]) -> list[Member]:
        """The least advanced devices, ties drawn by the scenario's seed and the round."""
        wanted = max(1, round(self.scenario.server.fraction * len(self.members)))
        draw = numpy_generator(self.scenario.seed, "sampling", self.round).permutation(len(self.members))
        ranked = sorted(active, key=lambda m: (m.task, m.epochs, m.failures, draw[m.number]))
        return sorted(ranked[:wanted], key=lambda m: m.number)

    def _run_round(self, fleet: Fleet, chosen: Sequence[Member]) -> None:
        start = time.monotonic()
        self.listener.round_started(self.round, self._rounds_left(), len(chosen))
        rows = {m.number: device_row(self.round, m.number, fleet.name_of(m.number), m.task, m.epochs) for m in chosen}
        self._train(fleet, [m for m in chosen if not m.only_untested(self.scenario)], rows)
        # Devices take over the new average when they are tested. Were it not safe on disk by then, a server killed in
        # between would ask them again for tensors that they no longer have.
        pending = Pending(rows, time.monotonic() - start)
        self._save(pending)
        self._finish_round(fleet, pending, start)

    def _finish_round(self, fleet: Fleet, pending: Pending, start: float) -> None:
        rows = pending.rows
        members = [self.members[number] for number in sorted(rows)]
        testable = [m for m in members if "error" not in rows[m.number] and m.only_untested(self.scenario)]
        if testable:
            self._test(fleet, testable, rows)
        for member in members:
            error = rows[member.number].get("error")
            member.failures = member.failures + 1 if error else 0
            if member.failures >= self.scenario.server.max_failures:
                member.dropped = str(error)
        self._book(pending, start)

    def _train(self, fleet: Fleet, chosen: Sequence[Member], rows: dict[int, Row]) -> None:
        goals = {m.number: m.goal(self.scenario) for m in chosen}
        sent = {m.number: self._message(fleet, m, goals[m.number], MessageType.TRAIN, rows) for m in chosen}
        self.listener.phase_started("train", len(sent))
        accepted: list[Contribution] = []
        for member, reply in self._exchange(fleet, sent, rows, "train"):
            try:
                report, arrays = self._answers.training(reply, member, goals[member.number])
            except (ProtocolError, ExchangeError) as error:
                self._refuse(rows, member.number, str(error))
                continue
            member.task, member.epochs, member.version = report.task, report.epochs, report.version
            row = rows[member.number]
            add_training_(row, report)
            row["bytes_up"] += size_in_bytes(arrays)
            if member.task < member.summed:  # the same samples under the same prefix: these sums are in already
                arrays = split(arrays, STATISTICS)[1]
            elif report.epochs == self.scenario.training.epochs:
                member.summed = member.task + 1
            if arrays:
                accepted.append(contribution(sent[member.number], arrays, float(report.examples)))
        if self.aggregator is not None:
            self.aggregator.update(accepted, self.round, fleet.grid)

    def _test(self, fleet: Fleet, testable: Sequence[Member], rows: dict[int, Row]) -> None:
        sent = {m.number: self._message(fleet, m, (m.task, m.epochs), MessageType.EVALUATE, rows) for m in testable}
        self.listener.phase_started("evaluate", len(sent))
        for member, reply in self._exchange(fleet, sent, rows, "evaluate"):
            try:
                report = self._answers.test(reply, member)
            except ProtocolError as error:
                self._refuse(rows, member.number, str(error))
                continue
            member.take_test(report)
            add_test_(rows[member.number], report)

    # -- messages ----------------------------------------------------------------------------------------------

    def _message(self, fleet: Fleet, member: Member, goal: tuple[int, int], kind: str, rows: dict[int, Row]) -> Message:
        version = self.aggregator.version if self.aggregator else 0
        instruction = Instruction(member.number, self.run_id, self._scenario_json, self.round, *goal, version)
        content = RecordDict({INSTRUCTION: ConfigRecord(instruction.to_record())})
        if self.aggregator and member.version != version:  # a device that has this version is not sent it again
            content[ARRAYS] = self.aggregator.record
            rows[member.number]["bytes_down"] += size_in_bytes(self.aggregator.arrays)
        node = fleet.node_of(member.number) or 0
        return Message(content, dst_node_id=node, message_type=kind, ttl=self.scenario.server.round_timeout)

    def _exchange(
        self, fleet: Fleet, sent: Mapping[int, Message], rows: dict[int, Row], phase: str
    ) -> Iterator[tuple[Member, Message]]:
        """Sends and waits; gives the replies that carry a report, by device number, and notes the rest as errors.

        It keeps no reply that it has given away: those of a large fleet are most of the server's memory.
        """
        fleet.forget_absent()
        reachable = {number: m for number, m in sent.items() if fleet.node_of(number) == m.metadata.dst_node_id}
        replies = fleet.send_and_wait(
            reachable, self.scenario.server.round_timeout, lambda n: self.listener.device_done(n, phase)
        )
        for number in sorted(sent):
            reply = replies.pop(number, None)
            if number not in reachable:
                self._refuse(rows, number, "not connected")
            elif reply is None:
                self._refuse(rows, number, f"no answer within {self.scenario.server.round_timeout:g} s")
            elif reply.has_error():
                self._refuse(rows, number, f"Flower error {reply.error.code}: {reply.error.reason}")
            elif "reason" in (record := record_of(reply)):
                try:
                    refusal = Refusal.from_record(record)
                except ProtocolError as error:
                    self._refuse(rows, number, str(error))
                    continue
                self._refuse(rows, number, refusal.reason)
                if 0 <= refusal.task < self.scenario.stream.tasks:  # the device knows best where it is
                    self.members[number].follow(refusal)
            else:
                yield self.members[number], reply

    def _refuse(self, rows: dict[int, Row], number: int, reason: str) -> None:
        rows[number]["error"] = reason
        self.listener.refused(number, reason)

    # -- the fleet ---------------------------------------------------------------------------------------------

    def _connect(self, fleet: Fleet) -> None:
        """Waits until the nodes of all devices that still have to learn are there, or the time to connect is over."""
        limit, start = self.scenario.server.connect_timeout, time.monotonic()
        wanted, shown = self._active(), -1
        while True:
            self._look(fleet)
            missing = [m for m in wanted if fleet.node_of(m.number) is None]
            there = len(wanted) - len(missing)
            if there != shown:
                self.listener.connected(there, len(wanted))
                shown = there
            if fleet.agreed and not missing and not fleet.unanswered:
                break
            nobody = fleet.agreed is None or (wanted and not there)
            if self._given_up(fleet, start) if nobody else time.monotonic() - start > limit:
                break
            fleet.pause(0.2)
        waited = "".join([f"after {limit:g} s (server.connect_timeout)", *(f"; {p}" for p in fleet.problems)])
        if fleet.agreed is None or (wanted and not there):
            self._fail(f"none of {len(wanted)} devices is connected {waited}")
        for member in missing:  # they are asked once they come
            self.listener.refused(member.number, f"not connected {waited}")
        fleet.settle()
        self._describe_network(fleet.agreed)

    def _reachable(self, fleet: Fleet) -> list[Member]:
        """The connected devices that still have to learn; waits for one, and gives up those that stay away."""
        active, start = self._active(), time.monotonic()
        while True:
            self._look(fleet)
            connected = [m for m in active if fleet.node_of(m.number) is not None]
            if connected:
                return connected
            if self._given_up(fleet, start):
                for member in active:
                    member.dropped = f"not connected for {self.scenario.server.connect_timeout:g} s"
                    self.listener.refused(member.number, member.dropped)
                return []
            fleet.pause(1)

    def _look(self, fleet: Fleet) -> None:
        fleet.look()
        if fleet.settled and (new := fleet.own_data - self._own_data):
            self.folder.note_own_data(new)
            self._own_data |= new
        if fleet.settled or not fleet.unanswered:  # before that the next answer may turn the majority
            for problem in fleet.problems:  # also where no device is missed for it
                self._warn(problem)

    def _given_up(self, fleet: Fleet, start: float) -> bool:
        """Whether to wait no longer, since `start`, for anybody at all.

        A board that is there and does not answer may be at work on a message of a server that was killed.
        """
        section, waited = self.scenario.server, time.monotonic() - start
        if not fleet.unanswered or waited <= section.connect_timeout:
            return waited > section.connect_timeout
        self._warn(
            f"{fleet.unanswered} nodes are there but have not answered; they may be at work on an earlier message, so "
            f"they are waited for, {section.round_timeout:g} s at most (server.round_timeout)"
        )
        return waited > section.round_timeout

    def _warn(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            logger.warning("%s", text)

    def _describe_network(self, greeting: Greeting) -> None:
        network = build_network(self.scenario, in_channels=greeting.channels, classes=greeting.classes)
        aggregator = Aggregator(self.scenario.server, self.scenario.method.build(network))
        if aggregator.shares:
            self.aggregator = aggregator
            if self._restored:
                self.aggregator.restore(*self._restored)
        self._answers = AnswerCheck(self.scenario, digest(network.prefix), channel_digest(network), self.aggregator)

    # -- book-keeping --------------------------------------------------------------------------------------------

    def _rounds_left(self) -> int:
        """An estimate: device-rounds still to come over devices a round."""
        per_round = max(1, round(self.scenario.server.fraction * len(self.members)))
        return -(-sum(m.rounds_left(self.scenario) for m in self.members) // per_round)

    def _results(self) -> Row:
        matrices = [m.rows for m in self.members if m.finished(self.scenario)]
        return run_results(
            matrices,
            self.scenario.stream.tasks,
            devices=len(self.members),
            dropped={str(m.number): m.dropped for m in self.members if m.dropped},
            rounds=self.folder.rows("rounds.jsonl"),
        )

    def _book(self, over: Pending, start: float) -> None:
        """Writes down a round that is over, then the state that comes after it."""
        rows = [over.rows[number] for number in sorted(over.rows)]
        finished = sum(m.finished(self.scenario) for m in self.members)
        row = round_row(rows, finished, over.training_seconds, time.monotonic() - start)
        self.folder.append("devices.jsonl", rows)
        self.folder.append("rounds.jsonl", [row])
        self._save(None)
        self.listener.round_finished(row)

    def _save(self, pending: Pending | None) -> None:
        values = {
            "round": self.round,
            "pending": asdict(pending) if pending else None,
            "version": self.aggregator.version if self.aggregator else 0,
            "members": [asdict(m) for m in self.members],
        }
        self._state.save(self.aggregator.state() if self.aggregator else {}, values)

    def _restore(self) -> Pending | None:
        """Goes back to the last saved point; a round whose training was over by then comes back as pending."""
        stored = self._state.load()
        if stored is None:
            self.folder.forget_after(0)
            return None
        tensors, values = stored
        pending = None
        self.round = values["round"]
        if values["pending"]:
            rows = {int(number): row for number, row in values["pending"]["rows"].items()}
            pending = Pending(rows, values["pending"]["training_seconds"])
        self.folder.forget_after(self.round - 1 if pending else self.round)
        self.members = [Member.from_saved(row) for row in values["members"]]
        self._restored = (tensors, values["version"])
        return pending
