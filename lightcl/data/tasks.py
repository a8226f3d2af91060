"""A task and its samples, a device's stream of tasks, and what a method knows of the task that it learns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, overload

import numpy as np
import torch
from torch import Tensor

from lightcl.data.augment import Augmentation, View, augmented
from lightcl.data.images import ImageSet
from lightcl.seeds import derive, torch_generator


class Batch:
    """`images` `[N, C, H, W]` (uint8, not yet normalized) and `labels` `[N]`, numbered as the rows of the head.

    `images` may be a function: the images are then read on first use, and not at all where a cache has the prefix
    outputs of all of them.
    """

    def __init__(
        self,
        images: Tensor | Callable[[], Tensor],
        labels: Tensor,
        members: Tensor | None = None,
        origin: Samples | None = None,
        view: View | None = None,
    ) -> None:
        self._images = images
        self.labels = labels
        self.members = members
        """Positions `[N]` of the images among the samples they were drawn from; None where nothing needs them."""
        self.origin = origin
        """The rows of the source that the images come from, in order; None for newly augmented or stored images."""
        self.view = view
        """The view of those rows that the images are; None: the rows without augmentation."""

    @property
    def images(self) -> Tensor:
        if not isinstance(self._images, Tensor):
            self._images = self._images()
        return self._images

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> Batch:
        """The batch with images and labels on `device`."""
        given = self._images
        images = given.to(device) if isinstance(given, Tensor) else lambda: self.images.to(device)
        return Batch(images, self.labels.to(device), self.members, self.origin, self.view)


@dataclass(frozen=True)
class Samples:
    """Some images of a source, read from disk on demand."""

    source: ImageSet
    indices: np.ndarray
    rows: np.ndarray | None = None
    """The row of the head for every class of the source, int64 `[C]`, -1 where it has none; None: row c is class c."""

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def labels(self) -> np.ndarray:
        """The classes of the images as the source numbers them, int64 `[N]`."""
        labels: np.ndarray = self.source.labels[self.indices]
        return labels

    @property
    def targets(self) -> Tensor:
        """The labels of a batch of all these images: rows of the head, int64 `[N]`."""
        return torch.from_numpy(self.labels if self.rows is None else self.rows[self.labels])

    def load(self, members: np.ndarray | slice = slice(None)) -> Batch:
        """The members (positions among these samples) as a batch, without augmentation; images are read when needed."""
        chosen = self.only(members)
        return Batch(chosen.images, chosen.targets, origin=chosen)

    def images(self) -> Tensor:
        """All images, uint8 `[N, C, H, W]`."""
        return torch.from_numpy(self.source.images[self.indices]).permute(0, 3, 1, 2)

    def only(self, members: np.ndarray | slice) -> Samples:
        """These members (positions among these samples) alone."""
        return Samples(self.source, self.indices[members], self.rows)

    def batches(self, size: int) -> Iterator[Batch]:
        for start in range(0, len(self), size):
            yield self.load(slice(start, start + size))


@dataclass(frozen=True)
class Task:
    """One task of one device: its classes and its private samples of them.

    `id` is the number of the task in the scenario's stream, from 0; a device that skips tasks has gaps in its ids.
    `classes` are numbered as in the source, `rows` as in the head.
    """

    id: int
    classes: tuple[int, ...]
    train: Samples
    held_out: Samples
    test: Samples

    @property
    def rows(self) -> tuple[int, ...]:
        """The rows of the head that answer for the classes, ascending."""
        rows = self.train.rows
        return self.classes if rows is None else tuple(int(rows[label]) for label in self.classes)

    def tested_on(self, evaluate_on: Literal["test", "held-out"]) -> Samples:
        """The images that `stream.evaluate_on` names."""
        return self.test if evaluate_on == "test" else self.held_out


@dataclass(frozen=True)
class Skipped:
    """A task that a device does not learn: its number, the reason, and the images that the device has for it.

    `train` counts training images without the held-out ones.
    """

    task: int
    reason: str
    train: int
    test: int


class TaskStream(Sequence[Task]):
    """The tasks that a device learns, in order; `skipped` are the scenario's other tasks.

    `head` are the classes that the rows of the head stand for: those of all streams of the fleet, ascending and
    numbered as in the source.
    """

    def __init__(
        self, tasks: Sequence[Task], head: Sequence[int], joint: bool = False, skipped: tuple[Skipped, ...] = ()
    ) -> None:
        self._tasks = tuple(tasks)
        self._positions = {task.id: position for position, task in enumerate(self._tasks)}
        self.head = tuple(head)
        self.joint = joint
        self.skipped = skipped

    @property
    def head_classes(self) -> int:
        """Rows of the head."""
        return len(self.head)

    @property
    def ids(self) -> tuple[int, ...]:
        """The scenario's numbers of these tasks, ascending."""
        return tuple(task.id for task in self._tasks)

    def position_of(self, task: int) -> int:
        """Position in this stream of the scenario's task number `task`. Raises KeyError for a task that is skipped."""
        return self._positions[task]

    @property
    def first(self) -> int:
        """Position of the first task to learn: joint training waits for all of them and learns them as one."""
        return max(len(self) - 1, 0) if self.joint else 0

    def to_learn(self, position: int) -> Task:
        """The task to learn at a position of this stream; under joint training it holds all tasks."""
        return merged(self._tasks) if self.joint else self._tasks[position]

    @overload
    def __getitem__(self, index: int) -> Task: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Task]: ...
    def __getitem__(self, index: int | slice) -> Task | Sequence[Task]:
        return self._tasks[index]

    def __len__(self) -> int:
        return len(self._tasks)


def merged(tasks: Sequence[Task]) -> Task:
    """All tasks as one, with the id of the last; `tasks` must not be empty.

    Images of tasks that do not share one source (a field stream's) are copied into memory.
    """

    def together(parts: Sequence[Samples]) -> Samples:
        sources = [part.source for part in parts]
        if any(source is not sources[0] for source in sources):
            images = np.concatenate([part.source.images[part.indices] for part in parts])
            labels = np.concatenate([part.labels for part in parts])
            return Samples(ImageSet(images, labels, sources[0].classes), np.arange(len(labels)), parts[0].rows)
        return Samples(parts[0].source, np.sort(np.concatenate([part.indices for part in parts])), parts[0].rows)

    return Task(
        tasks[-1].id,
        tuple(sorted({c for task in tasks for c in task.classes})),
        together([task.train for task in tasks]),
        together([task.held_out for task in tasks]),
        together([task.test for task in tasks]),
    )


@dataclass(frozen=True)
class TaskContext:
    """What a method knows of the task that it learns: its classes, and seeded samples of its training images.

    Classes and labels are rows of the head.
    """

    task: Task
    task_classes: Tensor
    seen_classes: Tensor
    batch_size: int
    seed: int
    device: torch.device
    epochs: int = 1
    """Epochs of the task."""
    augmentation: Augmentation = "none"
    padding: int = 4
    first_id: int = 0
    """Id of the first task that the device learns; not 0 where the device skips task 0."""
    views: int = 0
    """`data.views`."""
    view_seed: int = 0
    """The scenario's seed: views are the same on all devices."""

    def view(self, epoch: int) -> View | None:
        """The view of every training image in an epoch (0-based); views take turns. None: new augmentation instead."""
        if not self.views:
            return None
        return View(self.view_seed, epoch % self.views, self.augmentation, self.padding)

    @property
    def old_classes(self) -> Tensor:
        """The classes seen before this task, sorted."""
        return self.seen_classes[~torch.isin(self.seen_classes, self.task_classes)]

    @property
    def is_first(self) -> bool:
        """Whether this is the first task that the device learns."""
        return self.task.id == self.first_id

    def sample(self, size: int, purpose: str) -> Batch:
        """Up to `size` training images of this task without augmentation, drawn without replacement for `purpose`."""
        generator = np.random.default_rng(derive(self.seed, purpose))
        members = np.sort(generator.permutation(len(self.task.train))[:size])
        return self.task.train.load(members).to(self.device)

    def augment(self, images: Tensor, *purpose: int | str) -> Tensor:
        """The scenario's augmentation of uint8 images `[N, C, H, W]`, with a new draw for every `purpose`."""
        generator = torch_generator(self.seed, "augment", *purpose)
        return augmented(images.cpu(), generator, self.augmentation, self.padding).to(images.device)

    @staticmethod
    def position_of(labels: Tensor, classes: Tensor) -> Tensor:
        """Labels `[N]` as positions in the sorted tensor `classes`."""
        return torch.searchsorted(classes, labels)
