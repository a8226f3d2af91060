"""What the server knows of each device, what the device has to do next, and the form in which this is saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from lightcl.exchange.messages import Refusal, Tested, Trained
from lightcl.records.rows import DeviceRow
from lightcl.scenario import Scenario


@dataclass
class Entry:
    """One device of the fleet as the server knows it."""

    number: int
    task: int = 0
    epochs: int = 0
    version: int = 0
    """Of the shared tensors that it has."""
    failures: int = 0
    """Rounds in a row in which it failed."""
    summed: int = 0
    """Its first tasks whose statistics are in the fleet's sums: one that lost its state learns them again."""
    dropped: str = ""
    """Why it was dropped from the run; empty while it takes part."""
    rows: dict[str, dict[int, list[float]]] = field(default_factory=lambda: {"til": {}, "cil": {}})
    """The rows of its accuracy matrices, by setting and task."""

    @classmethod
    def from_saved(cls, values: Mapping[str, Any]) -> Self:
        """A device of a resumed run: every device gets another chance."""
        rows = {s: {int(task): row for task, row in rows.items()} for s, rows in values["rows"].items()}
        return cls(**{**values, "rows": rows, "dropped": "", "failures": 0})

    def finished(self, scenario: Scenario) -> bool:
        last = scenario.stream.tasks - 1
        return self.task == last and self.epochs == scenario.training.epochs and last in self.rows["til"]

    def only_untested(self, scenario: Scenario) -> bool:
        """Whether the device has learned its task and only has to be tested on it."""
        return self.epochs == scenario.training.epochs and self.task not in self.rows["til"]

    def goal(self, scenario: Scenario) -> tuple[int, int]:
        """The task and the number of its epochs that the device has to reach in its next round."""
        epochs, parts = scenario.training.epochs, scenario.server.rounds_per_task
        task, done = self.task, self.epochs
        if done == epochs and task in self.rows["til"]:
            task, done = task + 1, 0
        until = next((u for p in range(1, parts + 1) if (u := scenario.epochs_until(p)) > done), epochs)
        return task, until

    def rounds_left(self, scenario: Scenario) -> int:
        """Rounds in which it still has to train, if none fails."""
        if self.dropped or self.finished(scenario):
            return 0
        parts = scenario.server.rounds_per_task
        done = sum(scenario.epochs_until(p) <= self.epochs for p in range(1, parts + 1))
        return (scenario.stream.tasks - self.task) * parts - done

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
    """The entries of all devices."""

    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario
        self.entries = [Entry(number, scenario.first_task) for number in range(scenario.fleet.devices)]

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, number: int) -> Entry:
        return self.entries[number]

    @property
    def active(self) -> list[Entry]:
        """Devices that still have to learn."""
        return [entry for entry in self.entries if not entry.dropped and not entry.finished(self._scenario)]

    @property
    def finished(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.finished(self._scenario)]

    @property
    def dropped(self) -> dict[int, str]:
        """Why devices were dropped from the run, by number."""
        return {entry.number: entry.dropped for entry in self.entries if entry.dropped}

    @property
    def rounds_left(self) -> int:
        """An estimate: device-rounds still to come over devices per round."""
        per_round = max(1, round(self._scenario.server.fraction * len(self.entries)))
        return -(-sum(entry.rounds_left(self._scenario) for entry in self.entries) // per_round)

    def count_failures_(self, rows: Mapping[int, DeviceRow]) -> None:
        """At the end of a round: a device that failed too often in a row is dropped from the run."""
        for number, row in rows.items():
            entry = self.entries[number]
            entry.failures = entry.failures + 1 if row.error else 0
            if entry.failures >= self._scenario.server.max_failures:
                entry.dropped = str(row.error)

    def to_saved(self) -> list[dict[str, Any]]:
        return [asdict(entry) for entry in self.entries]

    def restore_(self, saved: Sequence[Mapping[str, Any]]) -> None:
        self.entries = [Entry.from_saved(values) for values in saved]
