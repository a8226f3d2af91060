"""What the server knows of each device, what the device has to do next, and the form in which this is saved."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import numpy as np

from lightcl.data.partition import train_counts
from lightcl.errors import one_line
from lightcl.exchange.messages import Refusal, Tested, Trained
from lightcl.metrics import row_over
from lightcl.preparation import Prepared
from lightcl.records.rows import DeviceRow, Results, RoundRow
from lightcl.scenario import Scenario

CAUSES = ("OutOfStep", "StateError", "TrainingFailure", "RequestError", "ExchangeError", "ProtocolError")
"""The errors that a device refuses with, as its reasons begin. Other words count as one more cause."""


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
    failed: int = 0
    """Rounds in which it failed since the server started."""
    fallbacks: list[str] = field(default_factory=list)
    """The causes that it has given for being behind where the server saw it (see Ledger.follow_)."""
    summed: tuple[int, ...] = ()
    """The tasks whose statistics are in the fleet's sums: a device that lost its state learns them again."""
    dropped: str = ""
    """Why it was dropped from the run; empty while it takes part."""
    rows: dict[str, dict[int, list[float]]] = field(default_factory=lambda: {"til": {}, "cil": {}})
    """The rows of its accuracy matrices, by setting and task; a row has one accuracy per task learned so far, NaN where
    its test images are deleted."""

    @classmethod
    def from_saved(cls, values: Mapping[str, Any]) -> Self:
        """A device of a resumed run: every device gets another chance."""
        rows = {s: {int(task): row for task, row in rows.items()} for s, rows in values["rows"].items()}
        tuples = {name: tuple(values[name]) for name in ("tasks", "summed")}
        another_chance = {"dropped": "", "failures": 0, "failed": 0, "fallbacks": []}
        return cls(**{**values, **tuples, "rows": rows, **another_chance})

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

    def progress(self, total: int) -> float:
        """The share of its own stream that it has learned, 0 to 1; `total` are the epochs of a task."""
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

    def rounds_left(self, ends: Sequence[int]) -> int:
        """Rounds in which it still has to train, if none fails; `ends` are the epochs after each round of a task."""
        return (len(self.tasks) - self.position) * len(ends) - bisect_right(ends, self.epochs)

    def add_training_(self, report: Trained) -> None:
        self.task, self.epochs, self.version = report.task, report.epochs, report.version

    def lacks_sums_of(self, task: int) -> bool:
        """Whether the statistics of this task are new to the fleet's sums.

        A device that learns a task again has the same samples and the same prefix: these sums are included already.
        """
        return task not in self.summed

    def add_sums_(self, task: int) -> None:
        """The statistics of this task are in the fleet's sums."""
        self.summed = (*self.summed, task)

    def add_test_(self, report: Tested) -> None:
        self.version = report.version
        self.rows["til"][report.task] = row_over(self.tasks, report.tasks, report.til)
        if report.cil:
            self.rows["cil"][report.task] = row_over(self.tasks, report.tasks, report.cil)

    def fall_back_(self, task: int, epochs: int, version: int) -> None:
        """Moves back to where the device says it is; its tests of that task and later ones are void."""
        self.task, self.epochs, self.version = task, epochs, version
        for rows in self.rows.values():
            for tested in [t for t in rows if t >= task]:
                del rows[tested]


@dataclass(frozen=True)
class KnownImages:
    """The training images that devices have, where the server has divided the images itself."""

    by_task: np.ndarray
    """Images that a device reports for a task, int `[devices, tasks]`."""
    by_class: np.ndarray
    """All of a device's images by class of the head, the held-out ones included, int `[devices, classes]`."""
    terms: tuple[int, int, str]
    """The channels of the images, the number of classes in the head and the digest of their names."""

    @classmethod
    def of(cls, prepared: Prepared) -> Self:
        counts, by_class = prepared.counts, train_counts(prepared.source, prepared.shares)
        if prepared.scenario.method.joint:  # its one task is all of them
            by_task = np.broadcast_to(counts.train_used[:, None], counts.train.shape)
        else:
            by_task = counts.train
        source, head = prepared.source, list(counts.head)
        return cls(by_task, by_class[:, head], (source.channels, len(head), source.names_digest(counts.head)))


class Ledger:
    """The entries of all devices. `tasks[d]` are the tasks that device d learns; None: every device learns all.

    `images` are those that the server knows of. `changed` are the numbers of the entries that the next save has to
    write.
    """

    def __init__(
        self,
        scenario: Scenario,
        tasks: Sequence[tuple[int, ...]] | None = None,
        images: KnownImages | None = None,
    ) -> None:
        self.scenario, self._images = scenario, images
        self._own_data: set[int] = set()
        every = tuple(range(scenario.stream.tasks))
        self.entries = []
        for number in range(scenario.fleet.devices):
            own = every if tasks is None else tuple(tasks[number])
            self.entries.append(Entry(number, own, self._first(own)))
        self.changed: set[int] = set()

    def _first(self, tasks: tuple[int, ...]) -> int:
        """The task that a device begins with: joint training waits until all of its tasks are there."""
        return tasks[-1 if self.scenario.method.joint else 0] if tasks else 0

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, number: int) -> Entry:
        return self.entries[number]

    @property
    def active(self) -> list[Entry]:
        """Devices that still have to learn."""
        return [
            entry for entry in self.entries if entry.tasks and not entry.dropped and not entry.finished(self.scenario)
        ]

    @property
    def finished(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.finished(self.scenario)]

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
        per_round = max(1, round(self.scenario.server.fraction * len(self.entries)))
        parts = range(1, self.scenario.server.rounds_per_task + 1)
        ends = [self.scenario.epochs_until(part) for part in parts]
        left = sum(entry.rounds_left(ends) for entry in self.active)
        return -(-left // per_round)

    def results(self, rounds: Sequence[RoundRow]) -> Results:
        """How the run ended after these rounds, over the devices that finished their streams."""
        finished = self.finished
        return Results.of(
            [entry.rows for entry in finished], self.scenario.stream.tasks, devices=len(self), dropped=self.dropped,
            rounds=rounds, ids=[entry.tasks for entry in finished], without_tasks=self.without_tasks,
        )  # fmt: skip

    def set_tasks_(self, number: int, tasks: Sequence[int]) -> None:
        """What a board with images of its own says that it can learn. A board that has begun keeps its tasks."""
        self._own_data.add(number)
        entry = self.entries[number]
        begun = entry.epochs or any(entry.rows.values())
        if not begun and entry.tasks != tuple(tasks):
            entry.tasks, entry.task = tuple(tasks), self._first(tuple(tasks))
            self.changed.add(number)

    @property
    def terms(self) -> tuple[int, int, str] | None:
        """What greetings say of the server's own images (`KnownImages.terms`); None where it has none."""
        return self._images.terms if self._images else None

    def without_version(self, version: int) -> list[Entry]:
        """Finished devices whose method needs the fleet's last head, and that have an older one."""
        if not self.scenario.method.sums_statistics:
            return []
        return [entry for entry in self.finished if entry.version < version]

    def images_of(self, number: int, task: int) -> int | None:
        """How many training images a device has for a task; None for images of its own."""
        if self._images is None or number in self._own_data:
            return None
        return int(self._images.by_task[number, task])

    def longest_first(self, entries: Sequence[Entry], tasks: Mapping[int, Sequence[int]]) -> list[Entry]:
        """The devices with the most training images for their `tasks` first, also where they are to be tested.

        Workers that take the devices in this order finish at nearly the same time: what comes last is short.
        """
        work = {e.number: sum(self.images_of(e.number, task) or 0 for task in tasks[e.number]) for e in entries}
        return sorted(entries, key=lambda entry: -work[entry.number])

    def classes_of(self, number: int) -> np.ndarray | None:
        """How many training images of each class a device has, int `[classes]`; None as in `images_of`."""
        return None if self._images is None or number in self._own_data else self._images.by_class[number]

    def follow_(self, number: int, refusal: Refusal) -> None:
        """Takes over where a refusal says that the device is, if that is behind where the server saw it.

        A device that has lost its state learns again what it has lost. That happens once per cause: with a second
        time for the same one it is dropped, or its run would never end. It cannot say that it is ahead.
        """
        entry = self.entries[number]
        if refusal.task not in entry.tasks or not 0 <= refusal.epochs <= self.scenario.training.epochs:
            return
        if (entry.tasks.index(refusal.task), refusal.epochs) >= (entry.position, entry.epochs):
            return
        named = refusal.reason.partition(":")[0]
        cause = named if named in CAUSES else "another cause"
        if cause in entry.fallbacks:
            entry.dropped = f"lost what it had learned a second time ({one_line(refusal.reason)})"
        else:
            entry.fallbacks = [*entry.fallbacks, cause]
            entry.fall_back_(refusal.task, refusal.epochs, refusal.version)

    def count_failures_(self, rows: Mapping[int, DeviceRow]) -> None:
        """At the end of a round: a device that failed too often, in a row or at all, is dropped from the run."""
        section = self.scenario.server
        for number, row in rows.items():
            entry = self.entries[number]
            entry.failures = entry.failures + 1 if row.error else 0
            entry.failed += bool(row.error)
            if entry.dropped:
                continue
            if entry.failures >= section.max_failures:
                entry.dropped = str(row.error)
            elif row.error and entry.failed >= section.max_failures_in_run:
                entry.dropped = f"failed in {entry.failed} rounds (server.max_failures_in_run), last: {row.error}"

    def take_changed_(self) -> list[Entry]:
        """The entries to be saved, by number; they count as unchanged afterwards."""
        changed, self.changed = self.changed, set()
        return [self.entries[number] for number in sorted(changed)]

    def rebuilt(self, rows: Sequence[DeviceRow], tasks: Mapping[int, Sequence[int]]) -> list[Entry] | None:
        """The entries of all devices after these rows, by round; None where the rows do not fit them.

        `tasks` are those of devices that learn others than this ledger says. The entries hold no version of the shared
        tensors, since rows do not say which a device has.
        """
        entries = []
        for known in self.entries:
            learns = tuple(tasks.get(known.number, known.tasks))
            entries.append(Entry(known.number, learns, self._first(learns)))
        for row in rows:
            if not 0 <= row.device < len(entries) or row.task not in entries[row.device].tasks:
                return None
            entry = entries[row.device]
            if row.examples is not None:  # it learned this task: what was tested of it and later ones is void
                entry.fall_back_(row.task, row.epochs, 0)
            entry.task, entry.epochs = row.task, row.epochs
            if row.til:
                entry.rows["til"][row.task] = row_over(entry.tasks, row.tested, row.til)
            if row.cil:
                entry.rows["cil"][row.task] = row_over(entry.tasks, row.tested, row.cil)
        return entries

    def restore_(self, saved: Sequence[Entry]) -> None:
        """Takes over the entries of a resumed run; devices that are not among them have not begun."""
        for entry in saved:
            self.entries[entry.number] = entry
