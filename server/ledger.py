"""What the server knows of each device of the fleet, and what it asks of it next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from lightcl.exchange.messages import Refusal, Tested
from lightcl.scenario import Scenario


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

    @classmethod
    def from_saved(cls, values: Mapping[str, Any]) -> Self:
        """A device of a run that goes on: whoever starts the run again gives every device another chance."""
        rows = {s: {int(task): row for task, row in rows.items()} for s, rows in values["rows"].items()}
        return cls(**{**values, "rows": rows, "dropped": "", "failures": 0})

    def finished(self, scenario: Scenario) -> bool:
        last = scenario.stream.tasks - 1
        return self.task == last and self.epochs == scenario.training.epochs and last in self.rows["til"]

    def only_untested(self, scenario: Scenario) -> bool:
        """Whether the device has learned its task and only has to be tested on it."""
        return self.epochs == scenario.training.epochs and self.task not in self.rows["til"]

    def goal(self, scenario: Scenario) -> tuple[int, int]:
        """The task and the number of its epochs the device is to have done after its next round."""
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

    def take_test(self, report: Tested) -> None:
        self.version = report.version
        self.rows["til"][report.task] = report.til
        if report.cil:
            self.rows["cil"][report.task] = report.cil

    def follow(self, refusal: Refusal) -> None:
        """Goes where the device says it is; what it was tested on from there on is void."""
        self.task, self.epochs, self.version = refusal.task, refusal.epochs, refusal.version
        for rows in self.rows.values():
            for task in [t for t in rows if t >= refusal.task]:
                del rows[task]
