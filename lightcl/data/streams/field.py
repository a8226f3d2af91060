"""A stream whose tasks come with time, from the images of a board (`lightcl/data/field.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import numpy as np

from lightcl.data.field import ASK_SECONDS, PARTS, CutTask, FieldDamaged, FieldTasks, NotReady
from lightcl.data.tasks import Samples, Task, TaskStream, merged


class FieldStream(TaskStream):
    """The stream of a device whose tasks come with time: all numbers are there, and a task's images when it is cut."""

    def __init__(self, tasks: FieldTasks) -> None:
        super().__init__((), range(len(tasks.plan.classes)), tasks.plan.joint)
        self.tasks = tasks
        self._opened: dict[int, Task] = {}

    @property
    def ids(self) -> tuple[int, ...]:
        return tuple(range(len(self)))

    def position_of(self, task: int) -> int:
        if not 0 <= task < len(self):
            raise KeyError(task)
        return task

    def to_learn(self, position: int) -> Task:
        """Cuts the task if its images are there. Raises NotReady where they are not, FieldDamaged where they are gone:
        deleted, and the state that had learned them lost."""
        numbers = range(position + 1) if self.joint else (position,)
        for number in numbers:
            if "train" in self.tasks.gather(number).deleted:
                raise FieldDamaged(
                    f"task {number}'s training images were deleted (data.keep: {self.tasks.plan.keep}), and the state "
                    "that had learned them is lost; restore the state folder from a copy, or remove it and begin a run "
                    "with new images"
                )
        return merged([self[number] for number in numbers]) if self.joint else self[position]

    def delete_before(self, number: int) -> None:
        """As `FieldTasks.delete_before`; the tasks are opened anew, without the images that are gone."""
        self.tasks.delete_before(number)
        self._opened = {n: task for n, task in self._opened.items() if n >= number}

    @overload
    def __getitem__(self, index: int) -> Task: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Task]: ...
    def __getitem__(self, index: int | slice) -> Task | Sequence[Task]:
        """Raises NotReady for a task that is not cut so far."""
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        if number not in self._opened:
            if number >= len(self.tasks.cut):
                raise NotReady(f"task {number} has no images so far", ASK_SECONDS)
            self._opened[number] = self._open(self.tasks.cut[number])
        return self._opened[number]

    def __len__(self) -> int:
        return self.tasks.plan.tasks

    def _open(self, cut: CutTask) -> Task:
        sets = {part: self.tasks.images(cut, part) for part in PARTS}
        names = self.tasks.plan.classes
        classes = tuple(number for number, name in enumerate(names) if name in cut.labels)
        train, held_out, test = (Samples(sets[part], np.arange(len(sets[part]))) for part in PARTS)
        return Task(cut.number, classes, train, held_out, test)
