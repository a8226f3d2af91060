"""A task and its samples, and what a method may see of the task it is learning."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import torch
from torch import Tensor

from lightcl.data.sources import ImageSet
from lightcl.seeds import derive


@dataclass(frozen=True)
class Batch:
    """`images` `[N, C, H, W]` (uint8, not yet normalised) and `labels` `[N]`, numbered as in the source."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Samples:
    """Some images of a source, read from disk only when asked for."""

    source: ImageSet
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def load(self, members: np.ndarray | slice = slice(None)) -> Batch:
        """The members (positions among these samples) as a batch, un-augmented."""
        indices = self.indices[members]
        images = torch.from_numpy(self.source.images[indices])
        return Batch(images.permute(0, 3, 1, 2), torch.from_numpy(self.source.labels[indices]))

    def batches(self, size: int) -> Iterator[Batch]:
        for start in range(0, len(self), size):
            yield self.load(slice(start, start + size))


@dataclass(frozen=True)
class Task:
    """One task of one device: its classes and its private samples of them."""

    id: int
    classes: tuple[int, ...]
    train: Samples
    held_out: Samples
    test: Samples


class TaskStream(Sequence[Task]):
    """The tasks a device meets, in order."""

    def __init__(self, tasks: Sequence[Task], head_classes: int) -> None:
        self._tasks = tuple(tasks)
        self.head_classes = head_classes

    @overload
    def __getitem__(self, index: int) -> Task: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Task]: ...
    def __getitem__(self, index: int | slice) -> Task | Sequence[Task]:
        return self._tasks[index]

    def __len__(self) -> int:
        return len(self._tasks)


@dataclass(frozen=True)
class TaskContext:
    """What a method sees while it learns a task: the classes, and seeded samples of the task's own training data."""

    task: Task
    task_classes: Tensor
    seen_classes: Tensor
    batch_size: int
    seed: int
    device: torch.device

    @property
    def old_classes(self) -> Tensor:
        """The classes seen before this task, sorted."""
        return self.seen_classes[~torch.isin(self.seen_classes, self.task_classes)]

    @property
    def is_first(self) -> bool:
        return self.task.id == 0

    def sample(self, size: int, purpose: str) -> Batch:
        """Up to `size` un-augmented training samples of this task, drawn without replacement for `purpose`."""
        generator = np.random.default_rng(derive(self.seed, purpose))
        members = np.sort(generator.permutation(len(self.task.train))[:size])
        batch = self.task.train.load(members)
        return Batch(batch.images.to(self.device), batch.labels.to(self.device))

    @staticmethod
    def position_of(labels: Tensor, classes: Tensor) -> Tensor:
        """Labels `[N]` as positions in the sorted tensor `classes`."""
        return torch.searchsorted(classes, labels)
