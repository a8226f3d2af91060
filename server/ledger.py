"""What the server knows of each device, what the device has to do next, and the form in which this is saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from lightcl.exchange.messages import Refusal, Tested, Trained
from lightcl.records.rows import DeviceRow, Results, RoundRow
from lightcl.scenario import Scenario


@dataclass
class Entry:
    """One device of the fleet as the server knows it."""

    number: int
    tasks: tuple[int, ...]
    """The scenario's numbers of the tasks that it learns, ascending; empty where it learns none."""
    task: int = 0
    """The task that it has reached, by the scenario's number."""
    epochs: int = 0
    version: int = 0
    """Of the shared tensors that it has."""
    failures: int = 0
    """Rounds in a row in which it failed."""
    summed: int = 0
    """The tasks before this one have their statistics in the fleet's sums: a device that lost its state learns them
    again."""
    dropped: str = ""
    """Why it was dropped from the run; empty while it takes part."""
    rows: dict[str, dict[int, list[float]]] = field(default_factory=lambda: {"til": {}, "cil": {}})
    """The rows of its accuracy matrices, by setting and task; a row has one accuracy per task learned so far."""

    @classmethod
    def from_saved(cls, values: Mapping[str, Any]) -> Self:
        """A device of a resumed run: every device gets another chance."""
        rows = {s: {int(task): row for task, row in rows.items()} for s, rows in values["rows"].items()}
        return cls(**{**values, "tasks": tuple(values["tasks"]), "rows": rows, "dropped": "", "failures": 0})

    def to_saved(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def position(self) -> int:
        """How many of its tasks come before the one that it has reached."""
        return self.tasks.index(self.task)

    def finished(self, scenario: Scenario) -> bool:
        """Whether it has learned its last task and is tested on it; never for a device without tasks."""
        return (
            bool(self.tasks)
            and self.task == self.tasks[-1]
            and self.epochs == scenario.training.epochs
            and self.task in self.rows["til"]
        )

    def progress(self, scenario: Scenario) -> float:
        """The share of its own stream that it has learned, 0 to 1."""
        total = scenario.training.epochs
        return (self.position * total + self.epochs) / (len(self.tasks) * total)

    def only_untested(self, scenario: Scenario) -> bool:
        """Whether the device has learned its task and only has to be tested on it."""
        return self.epochs == scenario.training.epochs and self.task not in self.rows["til"]

    def goal(self, scenario: Scenario) -> tuple[int, int]:
        """The task and the number of its epochs that the device has to reach in its next round."""
        epochs, parts = scenario.training.epochs, scenario.server.rounds_per_task
        task, done = self.task, self.epochs
        if done == epochs and task in self.rows["til"]:
            task, done = self.tasks[self.position + 1], 0
        until = next((u for p in range(1, parts + 1) if (u := scenario.epochs_until(p)) > done), epochs)
        return task, until

    def rounds_left(self, scenario: Scenario) -> int:
        """Rounds in which it still has to train, if none fails."""
        if self.dropped or not self.tasks or self.finished(scenario):
            return 0
        parts = scenario.server.rounds_per_task
        done = sum(scenario.epochs_until(p) <= self.epochs for p in range(1, parts + 1))
        return (len(self.tasks) - self.position) * parts - done

    def add_training_(self, report: Trained, finished_task: bool) -> bool:
        """Moves to where the device is; returns whether the statistics of this task are new to the fleet's sums."""
        self.task, self.epochs, self.version = report.task, report.epochs, report.version
        if self.task < self.summed:  # the same samples through the same prefix: these sums are included already
            return False
        if finished_task:
            self.summed = self.task + 1
        return True

    def add_test_(self, report: Tested) -> None:
        self.version = report.version
        self.rows["til"][report.task] = report.til
        if report.cil:
            self.rows["cil"][report.task] = report.cil

    def follow_(self, refusal: Refusal) -> None:
        """Moves to where the device says it is; its tests of that task and later ones are void."""
        self.task, self.epochs, self.version = refusal.task, refusal.epochs, refusal.version
        for rows in self.rows.values():
            for task in [t for t in rows if t >= refusal.task]:
                del rows[task]


class Ledger:
    """The entries of all devices. `tasks[d]` are the tasks that device d learns; None: every device learns all.

    `changed` are the numbers of the entries that the next save has to write.
    """

    def __init__(self, scenario: Scenario, tasks: Sequence[tuple[int, ...]] | None = None) -> None:
        self._scenario = scenario
        every = tuple(range(scenario.stream.tasks))
        self.entries = []
        for number in range(scenario.fleet.devices):
            own = every if tasks is None else tuple(tasks[number])
            self.entries.append(Entry(number, own, self._first(own)))
        self.changed: set[int] = set()

    def _first(self, tasks: tuple[int, ...]) -> int:
        """The task that a device begins with: joint training waits until all of its tasks are there."""
        return tasks[-1 if self._scenario.method.joint else 0] if tasks else 0

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, number: int) -> Entry:
        return self.entries[number]

    @property
    def active(self) -> list[Entry]:
        """Devices that still have to learn."""
        return [
            entry for entry in self.entries if entry.tasks and not entry.dropped and not entry.finished(self._scenario)
        ]

    @property
    def finished(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.finished(self._scenario)]

    @property
    def without_tasks(self) -> int:
        """The number of devices that have too few images for every task."""
        return sum(not entry.tasks for entry in self.entries)

    @property
    def dropped(self) -> dict[int, str]:
        """Why devices were dropped from the run, by number."""
        return {entry.number: entry.dropped for entry in self.entries if entry.dropped}

    @property
    def rounds_left(self) -> int:
        """An estimate: device-rounds still to come over devices per round."""
        per_round = max(1, round(self._scenario.server.fraction * len(self.entries)))
        return -(-sum(entry.rounds_left(self._scenario) for entry in self.entries) // per_round)

    def results(self, rounds: Sequence[RoundRow]) -> Results:
        """How the run ended after these rounds, over the devices that finished their streams."""
        finished = self.finished
        return Results.of(
            [entry.rows for entry in finished], self._scenario.stream.tasks, devices=len(self), dropped=self.dropped,
            rounds=rounds, ids=[entry.tasks for entry in finished], without_tasks=self.without_tasks,
        )  # fmt: skip

    def set_tasks_(self, number: int, tasks: Sequence[int]) -> None:
        """What a board with images of its own says that it can learn. A board that has begun keeps its tasks."""
        entry = self.entries[number]
        begun = entry.epochs or any(entry.rows.values())
        if not begun and entry.tasks != tuple(tasks):
            entry.tasks, entry.task = tuple(tasks), self._first(tuple(tasks))
            self.changed.add(number)

    def count_failures_(self, rows: Mapping[int, DeviceRow]) -> None:
        """At the end of a round: a device that failed too often in a row is dropped from the run."""
        for number, row in rows.items():
            entry = self.entries[number]
            entry.failures = entry.failures + 1 if row.error else 0
            if entry.failures >= self._scenario.server.max_failures:
                entry.dropped = str(row.error)

    def take_changed_(self) -> list[Entry]:
        """The entries to be saved, by number; they count as unchanged afterwards."""
        changed, self.changed = self.changed, set()
        return [self.entries[number] for number in sorted(changed)]

    def restore_(self, saved: Sequence[Entry]) -> None:
        """Takes over the entries of a resumed run; devices that are not among them have not begun."""
        for entry in saved:
            self.entries[entry.number] = entry
