"""The rounds of a run: who trains what, what comes back, what is refused, and where a killed run goes on."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import NoReturn, Protocol

import numpy as np
from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from lightcl.exchange import STATISTICS, Arrays, ExchangeError, check, size_in_bytes, split
from lightcl.networks.build import build_network
from lightcl.networks.weights import digest
from lightcl.protocol import (
    ARRAYS,
    INSTRUCTION,
    Greeting,
    Instruction,
    ProtocolError,
    Refusal,
    Tested,
    Trained,
)
from lightcl.pruning import channel_digest
from lightcl.scenario import Scenario
from lightcl.seeds import numpy_generator
from lightcl.state import StateFolder
from server.aggregation import Aggregator, Contribution, contribution
from server.fleet import Fleet, WorkerDied, record_of
from server.records import Row, RunFolder, add_test_, add_training_, device_row, round_row, run_results

logger = logging.getLogger("flwr")


class RunFailure(Exception):
    """The run cannot go on; the text says why."""


class Listener(Protocol):
    """Whoever wants to watch a run."""

    def connected(self, devices: int, wanted: int) -> None: ...
    def round_started(self, number: int, rounds_left: int, devices: int) -> None: ...
    def device_done(self, device: int, phase: str) -> None: ...
    def phase_started(self, phase: str, devices: int) -> None: ...
    def round_finished(self, row: Row) -> None: ...
    def refused(self, device: int, reason: str) -> None: ...


@dataclass
class Member:
    """One device of the fleet as the server knows it."""

    number: int
    task: int = 0
    epochs: int = 0
    version: int = 0
    failures: int = 0
    summed: int = 0
    """Its first tasks whose statistics are in the fleet's sums: one that lost its state learns them again."""
    dropped: str = ""
    rows: dict[str, dict[int, list[float]]] = field(default_factory=lambda: {"til": {}, "cil": {}})


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
        self._prefix = self._channel_sets = ""
        self.aggregator: Aggregator | None = None
        self._restored: tuple[dict[str, Tensor], int] | None = None
        self._warned: set[str] = set()
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
        late = [m for m in self.members if self._finished(m) and m.version < self.aggregator.version]
        if late:
            start = time.monotonic()
            self.round += 1
            self.listener.round_started(self.round, 1, len(late))
            rows = {m.number: device_row(self.round, m.number, fleet.name_of(m.number), m.task, m.epochs) for m in late}
            self._test(fleet, late, rows)
            ordered = [rows[m.number] for m in late]
            row = round_row(ordered, sum(self._finished(m) for m in self.members), 0.0, time.monotonic() - start)
            self.folder.append("devices.jsonl", ordered)
            self.folder.append("rounds.jsonl", [row])
            self._save(None)
            self.listener.round_finished(row)

    def _active(self) -> list[Member]:
        return [m for m in self.members if not m.dropped and not self._finished(m)]

    def _fail(self, reason: str) -> NoReturn:
        self.folder.fail(reason, {str(m.number): m.dropped for m in self.members if m.dropped})
        raise RunFailure(reason)

    def _finished(self, member: Member) -> bool:
        last = self.scenario.stream.tasks - 1
        return member.task == last and member.epochs == self.scenario.training.epochs and last in member.rows["til"]

    def _finished_task(self, report: Trained) -> bool:
        return report.epochs == self.scenario.training.epochs

    def _only_untested(self, member: Member) -> bool:
        """Whether the device has learned its task and only has to be tested on it."""
        return member.epochs == self.scenario.training.epochs and member.task not in member.rows["til"]

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
        self._train(fleet, [m for m in chosen if not self._only_untested(m)], rows)
        # Devices take over the new average when they are tested. Were it not safe on disk by then, a server killed in
        # between would ask them again for tensors that they no longer have.
        pending = Pending(rows, time.monotonic() - start)
        self._save(pending)
        self._finish_round(fleet, pending, start)

    def _finish_round(self, fleet: Fleet, pending: Pending, start: float) -> None:
        rows = pending.rows
        members = [self.members[number] for number in sorted(rows)]
        testable = [m for m in members if "error" not in rows[m.number] and self._only_untested(m)]
        if testable:
            self._test(fleet, testable, rows)
        for member in members:
            error = rows[member.number].get("error")
            member.failures = member.failures + 1 if error else 0
            if member.failures >= self.scenario.server.max_failures:
                member.dropped = str(error)
        ordered = [rows[m.number] for m in members]
        finished = sum(self._finished(m) for m in self.members)
        row = round_row(ordered, finished, pending.training_seconds, time.monotonic() - start)
        self.folder.append("devices.jsonl", ordered)
        self.folder.append("rounds.jsonl", [row])
        self._save(None)
        self.listener.round_finished(row)

    def _train(self, fleet: Fleet, chosen: Sequence[Member], rows: dict[int, Row]) -> None:
        goals = {m.number: self._goal(m) for m in chosen}
        sent = {m.number: self._message(fleet, m, goals[m.number], MessageType.TRAIN, rows) for m in chosen}
        self.listener.phase_started("train", len(sent))
        accepted: list[Contribution] = []
        for member, reply in self._exchange(fleet, sent, rows, "train"):
            try:
                report, arrays = self._checked_training(reply, member.number, goals[member.number])
            except (ProtocolError, ExchangeError) as error:
                self._refuse(rows, member.number, str(error))
                continue
            member.task, member.epochs, member.version = report.task, report.epochs, report.version
            row = rows[member.number]
            add_training_(row, report)
            row["bytes_up"] += size_in_bytes(arrays)
            if member.task < member.summed:  # the same samples under the same prefix: these sums are in already
                arrays = split(arrays, STATISTICS)[1]
            elif self._finished_task(report):
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
                report = self._checked_test(reply, member)
            except ProtocolError as error:
                self._refuse(rows, member.number, str(error))
                continue
            member.version = report.version
            member.rows["til"][report.task] = report.til
            if report.cil:
                member.rows["cil"][report.task] = report.cil
            add_test_(rows[member.number], report)

    def _checked_test(self, reply: Message, member: Member) -> Tested:
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

    def _checked_training(self, reply: Message, number: int, goal: tuple[int, int]) -> tuple[Trained, Arrays]:
        report = Trained.from_record(record_of(reply))
        _expect(report, number, *goal)
        if self._prefix and report.prefix != self._prefix:
            raise ProtocolError(f"its frozen prefix {report.prefix} is not the fleet's {self._prefix}")
        if self.aggregator and report.channel_sets != self._channel_sets:
            raise ProtocolError(
                f"device {number} has kept other channels ({report.channel_sets}) than the fleet "
                f"({self._channel_sets}), so its tensors are not averaged: it pruned other weights than the server"
            )
        if report.examples <= 0 or not np.isfinite(report.loss):
            raise ProtocolError(f"{report.examples} examples with a loss of {report.loss}")
        record = reply.content.array_records.get(ARRAYS)
        arrays = {name: array.numpy() for name, array in record.items()} if record is not None else {}
        check(arrays, self.aggregator.shapes(self._finished_task(report)) if self.aggregator else {})
        return report, arrays

    # -- messages ----------------------------------------------------------------------------------------------

    def _goal(self, member: Member) -> tuple[int, int]:
        """The task and the number of its epochs a device is to have done after its next round."""
        epochs, parts = self.scenario.training.epochs, self.scenario.server.rounds_per_task
        task, done = member.task, member.epochs
        if done == epochs and task in member.rows["til"]:
            task, done = task + 1, 0
        until = next((u for p in range(1, parts + 1) if (u := self.scenario.epochs_until(p)) > done), epochs)
        return task, until

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
                    self._follow(self.members[number], refusal)
            else:
                yield self.members[number], reply

    def _follow(self, member: Member, refusal: Refusal) -> None:
        member.task, member.epochs, member.version = refusal.task, refusal.epochs, refusal.version
        for rows in member.rows.values():
            for task in [t for t in rows if t >= refusal.task]:
                del rows[task]

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
        self._prefix, self._channel_sets = digest(network.prefix), channel_digest(network)
        aggregator = Aggregator(self.scenario.server, self.scenario.method.build(network))
        if aggregator.shares:
            self.aggregator = aggregator
            if self._restored:
                self.aggregator.restore(*self._restored)

    # -- book-keeping --------------------------------------------------------------------------------------------

    def _rounds_left(self) -> int:
        """An estimate: device-rounds still to come over devices a round."""
        parts, section = self.scenario.server.rounds_per_task, self.scenario.server
        per_round = max(1, round(section.fraction * len(self.members)))
        left = 0
        for member in self.members:
            if not member.dropped and not self._finished(member):
                done = sum(self.scenario.epochs_until(p) <= member.epochs for p in range(1, parts + 1))
                left += (self.scenario.stream.tasks - member.task) * parts - done
        return -(-left // per_round)

    def _results(self) -> Row:
        matrices = [m.rows for m in self.members if self._finished(m)]
        return run_results(
            matrices,
            self.scenario.stream.tasks,
            devices=len(self.members),
            dropped={str(m.number): m.dropped for m in self.members if m.dropped},
            rounds=self.folder.rows("rounds.jsonl"),
        )

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
        self.members = [
            replace(
                Member(**row),
                rows={s: {int(t): a for t, a in rows.items()} for s, rows in row["rows"].items()},
                dropped="",  # whoever starts the run again gives every device another chance
                failures=0,
            )
            for row in values["members"]
        ]
        self._restored = (tensors, values["version"])
        return pending


def _expect(report: Trained | Tested, device: int, task: int, epochs: int) -> None:
    said, asked = (report.device, report.task, report.epochs), (device, task, epochs)
    if said != asked:
        raise ProtocolError(f"speaks of (device, task, epoch) {said}, asked for {asked}")
