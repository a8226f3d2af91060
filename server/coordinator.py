"""The rounds of a run: who trains what, what comes back, what is refused, and where a killed run goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean
from typing import Any, Protocol

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from lightcl.exchange import Arrays, ExchangeError, check, outgoing, size_in_bytes
from lightcl.metrics import AccuracyMatrix, Spread, fleet_summary
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
from server.records import Row, RunFolder

PULL_SECONDS = 0.05


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


class Coordinator:
    """Runs a scenario over the devices behind a grid and writes the run folder.

    A device's place in its stream is its own: each round trains the least advanced devices, and one that failed is
    simply behind and tried again, until `max_failures` in a row put it out of the run.
    """

    def __init__(self, scenario: Scenario, folder: RunFolder, run: str, listener: Listener) -> None:
        self.scenario, self.folder, self.run_id, self.listener = scenario, folder, run, listener
        self.members = [Member(number) for number in range(scenario.fleet.devices)]
        self.round = 0
        self._nodes: dict[int, int] = {}
        self._names: dict[int, str] = {}
        self._state = StateFolder(folder.path / "server")
        self._scenario_json = scenario.model_dump_json()
        self._prefix = ""
        self._shapes: dict[str, tuple[int, ...]] = {}
        self.aggregator: Aggregator | None = None

    # -- the run -----------------------------------------------------------------------------------------------

    def run(self, grid: Grid) -> Row:
        """All rounds that are left; returns the results. Raises RunFailure where no device can be asked any more."""
        start = time.monotonic()
        self._connect(grid)
        self._restore()
        while active := [m for m in self.members if not m.dropped and not self._finished(m)]:
            self.round += 1
            self._run_round(grid, self._choose(active))
        results = self._results(time.monotonic() - start)
        self.folder.finish(results)
        if not results["devices_finished"]:
            reasons = {m.dropped for m in self.members if m.dropped}
            raise RunFailure(f"no device finished its stream: {'; '.join(sorted(reasons)[:3])}")
        return results

    def _finished(self, member: Member) -> bool:
        last = self.scenario.stream.tasks - 1
        return member.task == last and member.epochs == self.scenario.training.epochs and last in member.rows["til"]

    def _choose(self, active: Sequence[Member]) -> list[Member]:
        """The least advanced devices, ties drawn by the scenario's seed and the round."""
        wanted = max(1, round(self.scenario.server.fraction * len(self.members)))
        draw = numpy_generator(self.scenario.seed, "sampling", self.round).permutation(len(self.members))
        ranked = sorted(active, key=lambda m: (m.failures, m.task, m.epochs, draw[m.number]))
        return sorted(ranked[:wanted], key=lambda m: m.number)

    def _run_round(self, grid: Grid, chosen: Sequence[Member]) -> None:
        start = time.monotonic()
        self._greet(grid, [n for n in grid.get_node_ids() if n not in self._nodes.values()])
        self.listener.round_started(self.round, self._rounds_left(), len(chosen))
        rows: dict[int, Row] = {m.number: self._row(m) for m in chosen}

        trained = self._train(grid, chosen, rows)
        training_seconds = time.monotonic() - start
        testable = [m for m in trained if m.epochs == self.scenario.training.epochs]
        if testable:
            self._test(grid, testable, rows)

        for member in chosen:
            if "error" in rows[member.number]:
                member.failures += 1
                if member.failures >= self.scenario.server.max_failures:
                    member.dropped = str(rows[member.number]["error"])
            else:
                member.failures = 0
        ordered = [rows[number] for number in sorted(rows)]
        self.folder.append("devices.jsonl", ordered)
        row = self._round_row(ordered, training_seconds, time.monotonic() - start)
        self.folder.append("rounds.jsonl", [row])
        self._save()
        self.listener.round_finished(row)
        if all(m.dropped for m in self.members):
            raise RunFailure(f"every device is out of the run; the last reason: {ordered[-1].get('error')}")

    def _train(self, grid: Grid, chosen: Sequence[Member], rows: dict[int, Row]) -> list[Member]:
        goals = {m.number: self._goal(m) for m in chosen}
        sent = {m.number: self._message(m, goals[m.number], MessageType.TRAIN, rows) for m in chosen}
        self.listener.phase_started("train", len(sent))
        accepted: list[tuple[Message, Arrays, float]] = []
        trained: list[Member] = []
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
            trained.append(member)
            if arrays:
                accepted.append((sent[member.number], arrays, float(report.examples)))
        if self.aggregator is not None:
            # Sums of floats depend on their order; replies come in whatever order the workers finish.
            accepted.sort(key=lambda item: self._member_at(item[0].metadata.dst_node_id))
            self.aggregator.update(accepted, self.round, grid)
        return trained

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
        instruction = Instruction(self.run_id, self._scenario_json, self.round, *goal, version)
        content = RecordDict({INSTRUCTION: ConfigRecord(instruction.to_record())})
        if self.aggregator and member.version != version:  # a device that has this version is not sent it again
            arrays = self.aggregator.arrays
            content[ARRAYS] = ArrayRecord({name: Array(array) for name, array in arrays.items()})
            rows[member.number]["bytes_down"] += size_in_bytes(arrays)
        return Message(content, dst_node_id=self._nodes.get(member.number, 0), message_type=kind)

    def _exchange(
        self, grid: Grid, sent: Mapping[int, Message], rows: dict[int, Row], phase: str
    ) -> list[tuple[Member, Message]]:
        """Sends and waits; returns the replies that carry a report, by device number, and notes the rest as errors."""
        reachable = {number: m for number, m in sent.items() if number in self._nodes}
        replies = _send_and_wait(
            grid, reachable, self.scenario.server.round_timeout, lambda n: self.listener.device_done(n, phase)
        )
        answered: list[tuple[Member, Message]] = []
        for number in sorted(sent):
            reply = replies.get(number)
            if number not in self._nodes:
                self._refuse(rows, number, "not connected")
            elif reply is None:
                self._refuse(rows, number, f"no answer within {self.scenario.server.round_timeout:g} s")
            elif reply.has_error():
                self._nodes.pop(number)  # it may come back as another node
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

    def _refuse(self, rows: dict[int, Row], number: int, reason: str) -> None:
        rows[number]["error"] = reason
        self.listener.refused(number, reason)

    # -- the fleet ---------------------------------------------------------------------------------------------

    def _connect(self, grid: Grid) -> None:
        """Waits until every device has said who it is."""
        wanted, deadline = len(self.members), time.monotonic() + self.scenario.server.connect_timeout
        known: set[int] = set()
        while True:
            fresh = [node for node in grid.get_node_ids() if node not in known]
            known.update(fresh)
            self._greet(grid, fresh)
            self.listener.connected(len(self._nodes), wanted)
            if len(self._nodes) == wanted:
                return
            if time.monotonic() > deadline:
                raise RunFailure(
                    f"{len(self._nodes)} of {wanted} devices are connected after "
                    f"{self.scenario.server.connect_timeout:g} s (server.connect_timeout)"
                )
            time.sleep(0.2)

    def _greet(self, grid: Grid, nodes: Sequence[int]) -> None:
        """Learns which device is behind a node, and from the first one what the network looks like."""
        if not nodes:
            return
        instruction = Instruction(self.run_id, self._scenario_json, self.round, 0, 0, 0)
        messages = {
            node: Message(
                RecordDict({INSTRUCTION: ConfigRecord(instruction.to_record())}),
                dst_node_id=node,
                message_type=MessageType.QUERY,
            )
            for node in nodes
        }
        replies = _send_and_wait(grid, messages, self.scenario.server.connect_timeout, lambda _: None)
        for node, reply in replies.items():
            if reply.has_error():
                continue
            record = _record(reply)
            if "reason" in record:
                raise RunFailure(f"device {record['device']}: {record['reason']}")
            greeting = Greeting.from_record(record)
            if not 0 <= greeting.device < len(self.members):
                raise RunFailure(
                    f"node {greeting.name!r} is device {greeting.device}; fleet.devices is {len(self.members)}"
                )
            held_by = self._nodes.get(greeting.device)
            if held_by is not None and held_by in grid.get_node_ids():
                raise RunFailure(
                    f"{greeting.name!r} and {self._names[greeting.device]!r} both say they are device {greeting.device}; "
                    "give every SuperNode its own partition-id"
                )
            self._nodes[greeting.device], self._names[greeting.device] = node, greeting.name
            if not self._prefix:
                self._describe_network(greeting)

    def _describe_network(self, greeting: Greeting) -> None:
        network = build_network(self.scenario, in_channels=greeting.channels, classes=greeting.classes)
        self._prefix = digest(network.prefix)
        initial = outgoing(network, self.scenario.server.aggregation)
        self._shapes = {name: array.shape for name, array in initial.items()}
        if initial:
            self.aggregator = Aggregator(self.scenario.server, initial)

    def _member_at(self, node: int) -> int:
        return next(number for number, held in self._nodes.items() if held == node)

    # -- records -----------------------------------------------------------------------------------------------

    def _row(self, member: Member) -> Row:
        name = self._names.get(member.number, "")
        return {
            "round": self.round, "device": member.number, "name": name, "task": member.task, "epochs": member.epochs,
            "bytes_down": 0, "bytes_up": 0, "timing": {},
        }  # fmt: skip

    def _round_row(self, rows: Sequence[Row], training_seconds: float, seconds: float) -> Row:
        tested = [row for row in rows if "til" in row]
        losses = [row["loss"] for row in rows if "loss" in row]
        return {
            "round": self.round,
            "task": max(row["task"] for row in rows),
            "devices": len(rows),
            "failed": sum("error" in row for row in rows),
            "devices_finished": sum(self._finished(m) for m in self.members),
            "loss": fmean(losses) if losses else None,
            "til": asdict(Spread.of([fmean(row["til"]) for row in tested])) if tested else None,
            "cil": asdict(Spread.of([fmean(row["cil"]) for row in tested])) if tested else None,
            "bytes_down": sum(row["bytes_down"] for row in rows),
            "bytes_up": sum(row["bytes_up"] for row in rows),
            "timing": {"train_seconds": training_seconds, "seconds": seconds},
        }

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

    def _results(self, seconds: float) -> Row:
        finished = [m for m in self.members if self._finished(m)]
        figures: dict[str, Any] = {}
        for setting in ("til", "cil"):
            matrices = [AccuracyMatrix.from_rows(m.rows[setting], self.scenario.stream.tasks) for m in finished]
            figures[setting] = {key: asdict(spread) for key, spread in fleet_summary(matrices).items()}
        return {
            "status": "completed",
            "devices": len(self.members),
            "devices_finished": len(finished),
            "dropped": {str(m.number): m.dropped for m in self.members if m.dropped},
            "rounds": self.round,
            **figures,
            "timing": {
                "seconds": sum(row["timing"]["seconds"] for row in self.folder.rows("rounds.jsonl")),
                "last_start_seconds": seconds,
            },
        }

    def _save(self) -> None:
        values = {
            "round": self.round,
            "version": self.aggregator.version if self.aggregator else 0,
            "members": [asdict(m) for m in self.members],
        }
        self._state.save(self.aggregator.state() if self.aggregator else {}, values)

    def _restore(self) -> None:
        stored = self._state.load()
        if stored is None:
            self.folder.forget_after(0)
            return
        tensors, values = stored
        self.round = values["round"]
        self.folder.forget_after(self.round)
        self.members = [
            replace(
                Member(**row),
                rows={s: {int(t): a for t, a in rows.items()} for s, rows in row["rows"].items()},
            )
            for row in values["members"]
        ]
        if self.aggregator:
            self.aggregator.restore(tensors, values["version"])


def _record(reply: Message) -> Any:
    return reply.content.config_records.get(REPLY) or {}


def _send_and_wait(
    grid: Grid, messages: Mapping[int, Message], timeout: float, done: Callable[[int], None]
) -> dict[int, Message]:
    """Replies by the same keys; those that did not come within `timeout` seconds are missing."""
    keys = {}
    for key, message in messages.items():
        (message_id,) = grid.push_messages([message])
        keys[message_id] = key
    replies: dict[int, Message] = {}
    deadline = time.monotonic() + timeout
    while len(replies) < len(messages) and time.monotonic() < deadline:
        waiting = [i for i, key in keys.items() if key not in replies]
        for reply in grid.pull_messages(waiting):
            key = keys[reply.metadata.reply_to_message_id]
            replies[key] = reply
            done(key)
        time.sleep(PULL_SECONDS)
    return replies
