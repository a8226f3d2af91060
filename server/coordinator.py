"""The rounds of a run: who trains what, what comes back, what is refused, and where a killed run goes on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from lightcl.exchange import Arrays, ExchangeError, check, outgoing, size_in_bytes
from lightcl.networks.build import build_network
from lightcl.networks.weights import digest
from lightcl.protocol import (
    ARRAYS,
    INSTRUCTION,
    REPLY,
    Greeting,
    Instruction,
    ProtocolError,
    Refusal,
    Tested,
    Trained,
)
from lightcl.scenario import Scenario
from lightcl.seeds import numpy_generator
from lightcl.state import StateFolder
from server.aggregation import Aggregator
from server.records import Row, RunFolder, device_row, round_row, run_results

PULL_SECONDS = 0.05


class RunStopped(Exception):
    """The user asked the run to stop; it can be resumed."""


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
        self.members = [Member(number) for number in range(scenario.fleet.devices)]
        self.round = 0
        self._partitions = scenario.fleet.devices
        self._nodes: dict[int, int] = {}
        self._names: dict[int, str] = {}
        self._rivals: list[str] = []
        self._state = StateFolder(folder.path / "server")
        self._scenario_json = scenario.model_dump_json()
        self._prefix = ""
        self._shapes: dict[str, tuple[int, ...]] = {}
        self.aggregator: Aggregator | None = None
        self.stop = threading.Event()
        """Set from another thread, it ends the run at the next look at the grid."""

    # -- the run -----------------------------------------------------------------------------------------------

    def run(self, grid: Grid) -> Row:
        """All rounds that are left; returns the results. Raises RunFailure where no device can be asked any more."""
        self._connect(grid)
        pending = self._restore()
        if pending:
            self._finish_round(grid, pending, time.monotonic() - pending.training_seconds)
        while active := [m for m in self.members if not m.dropped and not self._finished(m)]:
            reachable = self._reachable(grid, active)
            if reachable:
                self.round += 1
                self._run_round(grid, self._choose(reachable))
        results = self._results()
        if not results["devices_finished"]:
            reasons = sorted({m.dropped for m in self.members})
            self.folder.fail(results)
            raise RunFailure(f"no device finished its stream: {'; '.join(reasons[:3])}")
        self.folder.finish(results)
        return results

    def _finished(self, member: Member) -> bool:
        last = self.scenario.stream.tasks - 1
        return member.task == last and member.epochs == self.scenario.training.epochs and last in member.rows["til"]

    def _reachable(self, grid: Grid, active: Sequence[Member]) -> list[Member]:
        """The devices that are connected; waits for one. Those that stay away too long are put out of the run."""
        deadline = time.monotonic() + self.scenario.server.connect_timeout
        while True:
            present = set(grid.get_node_ids())
            self._greet(grid, [node for node in present if node not in self._nodes.values()])
            connected = [m for m in active if self._node_of(m.number) in present]
            if connected:
                return connected
            if time.monotonic() > deadline:
                for member in active:
                    member.dropped = f"not connected for {self.scenario.server.connect_timeout:g} s"
                    self.listener.refused(member.number, member.dropped)
                return []
            time.sleep(1)

    def _choose(self, active: Sequence[Member]) -> list[Member]:
        """The least advanced devices, ties drawn by the scenario's seed and the round."""
        wanted = max(1, round(self.scenario.server.fraction * len(self.members)))
        draw = numpy_generator(self.scenario.seed, "sampling", self.round).permutation(len(self.members))
        ranked = sorted(active, key=lambda m: (m.failures, m.task, m.epochs, draw[m.number]))
        return sorted(ranked[:wanted], key=lambda m: m.number)

    def _run_round(self, grid: Grid, chosen: Sequence[Member]) -> None:
        start = time.monotonic()
        self.listener.round_started(self.round, self._rounds_left(), len(chosen))
        rows = {m.number: device_row(self.round, m.number, self._name(m.number), m.task, m.epochs) for m in chosen}
        self._train(grid, chosen, rows)
        # Devices take over the new average when they are tested. Were it not safe on disk by then, a server killed in
        # between would ask them again for tensors that they no longer have.
        pending = Pending(rows, time.monotonic() - start)
        self._save(pending)
        self._finish_round(grid, pending, start)

    def _finish_round(self, grid: Grid, pending: Pending, start: float) -> None:
        rows = pending.rows
        members = [self.members[number] for number in sorted(rows)]
        testable = [m for m in members if "loss" in rows[m.number] and m.epochs == self.scenario.training.epochs]
        if testable:
            self._test(grid, testable, rows)
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

    def _train(self, grid: Grid, chosen: Sequence[Member], rows: dict[int, Row]) -> None:
        goals = {m.number: self._goal(m) for m in chosen}
        sent = {m.number: self._message(m, goals[m.number], MessageType.TRAIN, rows) for m in chosen}
        self.listener.phase_started("train", len(sent))
        accepted: list[tuple[Message, Arrays, float]] = []
        for member, reply in self._exchange(grid, sent, rows, "train"):
            try:
                report, arrays = self._checked_training(reply, goals[member.number])
            except (ProtocolError, ExchangeError) as error:
                self._refuse(rows, member.number, str(error))
                continue
            member.task, member.epochs, member.version = report.task, report.epochs, report.version
            row = rows[member.number]
            row |= {"task": report.task, "epochs": report.epochs, "examples": report.examples, "loss": report.loss}
            row["bytes_up"] += size_in_bytes(arrays)
            row["timing"] |= {"train_seconds": report.seconds, "peak_memory_mib": report.peak_memory_mib}
            if arrays:
                accepted.append((sent[member.number], arrays, float(report.examples)))
        if self.aggregator is not None:
            self.aggregator.update(accepted, self.round, grid)

    def _test(self, grid: Grid, testable: Sequence[Member], rows: dict[int, Row]) -> None:
        sent = {m.number: self._message(m, (m.task, m.epochs), MessageType.EVALUATE, rows) for m in testable}
        self.listener.phase_started("evaluate", len(sent))
        for member, reply in self._exchange(grid, sent, rows, "evaluate"):
            try:
                report = Tested.from_record(_record(reply))
                if (report.task, report.epochs) != (member.task, member.epochs) or len(report.til) != member.task + 1:
                    raise ProtocolError(
                        f"the test is of task {report.task}, epoch {report.epochs}, not of what was asked"
                    )
                if not all(0 <= a <= 1 for a in [*report.til, *report.cil]):
                    raise ProtocolError("an accuracy outside 0..1")
            except ProtocolError as error:
                self._refuse(rows, member.number, str(error))
                continue
            member.version = report.version
            member.rows["til"][report.task], member.rows["cil"][report.task] = report.til, report.cil
            row = rows[member.number]
            row |= {"til": report.til, "cil": report.cil, "images": report.images}
            row["timing"]["evaluate_seconds"] = report.seconds

    def _checked_training(self, reply: Message, goal: tuple[int, int]) -> tuple[Trained, Arrays]:
        report = Trained.from_record(_record(reply))
        if (report.task, report.epochs) != goal:
            raise ProtocolError(
                f"trained task {report.task} to epoch {report.epochs}, asked for {goal[0]} to {goal[1]}"
            )
        if self._prefix and report.prefix != self._prefix:
            raise ProtocolError(f"its frozen prefix {report.prefix} is not the fleet's {self._prefix}")
        if report.examples <= 0 or not np.isfinite(report.loss):
            raise ProtocolError(f"{report.examples} examples with a loss of {report.loss}")
        record = reply.content.array_records.get(ARRAYS)
        arrays = {name: array.numpy() for name, array in record.items()} if record is not None else {}
        check(arrays, self._shapes)
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

    def _message(self, member: Member, goal: tuple[int, int], kind: str, rows: dict[int, Row]) -> Message:
        version = self.aggregator.version if self.aggregator else 0
        instruction = Instruction(member.number, self.run_id, self._scenario_json, self.round, *goal, version)
        content = RecordDict({INSTRUCTION: ConfigRecord(instruction.to_record())})
        if self.aggregator and member.version != version:  # a device that has this version is not sent it again
            arrays = self.aggregator.arrays
            content[ARRAYS] = ArrayRecord({name: Array(array) for name, array in arrays.items()})
            rows[member.number]["bytes_down"] += size_in_bytes(arrays)
        node = self._node_of(member.number) or 0
        return Message(content, dst_node_id=node, message_type=kind, ttl=self.scenario.server.round_timeout)

    def _exchange(
        self, grid: Grid, sent: Mapping[int, Message], rows: dict[int, Row], phase: str
    ) -> list[tuple[Member, Message]]:
        """Sends and waits; returns the replies that carry a report, by device number, and notes the rest as errors."""
        reachable = {number: m for number, m in sent.items() if self._node_of(number) is not None}
        replies = self._send_and_wait(
            grid, reachable, self.scenario.server.round_timeout, lambda n: self.listener.device_done(n, phase)
        )
        answered: list[tuple[Member, Message]] = []
        for number in sorted(sent):
            reply = replies.get(number)
            if number not in reachable:
                self._refuse(rows, number, "not connected")
            elif reply is None:
                self._refuse(rows, number, f"no answer within {self.scenario.server.round_timeout:g} s")
            elif reply.has_error():
                self._nodes.pop(number % self._partitions, None)  # it may come back as another node
                self._refuse(rows, number, f"Flower error {reply.error.code}: {reply.error.reason}")
            elif "reason" in (record := _record(reply)):
                refusal = Refusal.from_record(record)
                self._refuse(rows, number, refusal.reason)
                if refusal.task >= 0:  # the device knows best where it is
                    self._follow(self.members[number], refusal)
            else:
                answered.append((self.members[number], reply))
        return answered

    def _follow(self, member: Member, refusal: Refusal) -> None:
        member.task, member.epochs, member.version = refusal.task, refusal.epochs, refusal.version
        for rows in member.rows.values():
            for task in [t for t in rows if t >= refusal.task]:
                del rows[task]

    def _refuse(self, rows: dict[int, Row], number: int, reason: str) -> None:
        rows[number]["error"] = reason
        self.listener.refused(number, reason)

    def _send_and_wait(
        self, grid: Grid, messages: Mapping[int, Message], timeout: float, done: Callable[[int], None]
    ) -> dict[int, Message]:
        """Replies by the same keys; those that did not come within `timeout` seconds are missing."""
        keys = {}
        for key, message in messages.items():
            (message_id,) = grid.push_messages([message])
            keys[message_id] = key
        replies: dict[int, Message] = {}
        deadline = time.monotonic() + timeout
        while len(replies) < len(messages) and time.monotonic() < deadline:
            if self.stop.is_set():
                raise RunStopped
            for reply in grid.pull_messages([i for i, key in keys.items() if key not in replies]):
                key = keys[reply.metadata.reply_to_message_id]
                replies[key] = reply
                done(key)
            time.sleep(PULL_SECONDS)
        return replies

    # -- the fleet ---------------------------------------------------------------------------------------------

    def _node_of(self, device: int) -> int | None:
        """The node that hosts a device, if it is connected."""
        return self._nodes.get(device % self._partitions)

    def _name(self, device: int) -> str:
        return self._names.get(device % self._partitions, "")

    def _connect(self, grid: Grid) -> None:
        """Waits until the nodes of every device have said who they are."""
        deadline = time.monotonic() + self.scenario.server.connect_timeout
        known: set[int] = set()
        while True:
            fresh = [node for node in grid.get_node_ids() if node not in known]
            known.update(fresh)
            self._greet(grid, fresh)
            hosted = sum(self._node_of(m.number) is not None for m in self.members)
            self.listener.connected(hosted, len(self.members))
            if hosted == len(self.members):
                return
            if time.monotonic() > deadline:
                rivals = f"; same partition-id: {', '.join(self._rivals)}" if self._rivals else ""
                raise RunFailure(
                    f"{hosted} of {len(self.members)} devices are connected after "
                    f"{self.scenario.server.connect_timeout:g} s (server.connect_timeout){rivals}"
                )
            time.sleep(0.2)

    def _greet(self, grid: Grid, nodes: Sequence[int]) -> None:
        """Learns which devices a node hosts, and from the first one what the network looks like."""
        instruction = Instruction(0, self.run_id, self._scenario_json, self.round, 0, 0, 0).to_record()
        messages = {
            node: Message(
                RecordDict({INSTRUCTION: ConfigRecord(instruction)}), dst_node_id=node, message_type=MessageType.QUERY
            )
            for node in nodes
        }
        replies = self._send_and_wait(grid, messages, self.scenario.server.connect_timeout, lambda _: None)
        for node, reply in replies.items():
            if reply.has_error():
                continue
            record = _record(reply)
            if "reason" in record:
                raise RunFailure(f"a node cannot take part: {record['reason']}")
            self._admit(grid, node, Greeting.from_record(record))

    def _admit(self, grid: Grid, node: int, greeting: Greeting) -> None:
        self._partitions = greeting.partitions or len(self.members)
        if not 0 <= greeting.partition < self._partitions:
            raise RunFailure(f"node {greeting.name!r} has partition-id {greeting.partition} of {self._partitions}")
        held_by = self._nodes.get(greeting.partition)
        if held_by is not None and held_by in grid.get_node_ids():
            # A board that restarted without a key looks like this for a minute, so the newer one counts; two boards
            # with one number look the same, and then a device is missing when the time to connect is over.
            self._rivals.append(f"{self._names[greeting.partition]!r} and {greeting.name!r} as {greeting.partition}")
        self._nodes[greeting.partition], self._names[greeting.partition] = node, greeting.name
        if not self._prefix:
            self._describe_network(greeting)

    def _describe_network(self, greeting: Greeting) -> None:
        network = build_network(self.scenario, in_channels=greeting.channels, classes=greeting.classes)
        self._prefix = digest(network.prefix)
        initial = outgoing(network, self.scenario.server.aggregation)
        self._shapes = {name: array.shape for name, array in initial.items()}
        if initial:
            self.aggregator = Aggregator(self.scenario.server, initial)

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
            replace(Member(**row), rows={s: {int(t): a for t, a in rows.items()} for s, rows in row["rows"].items()})
            for row in values["members"]
        ]
        if self.aggregator:
            self.aggregator.restore(tensors, values["version"])
        return pending


def _record(reply: Message) -> Any:
    return reply.content.config_records.get(REPLY) or {}
