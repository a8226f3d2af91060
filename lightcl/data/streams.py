"""How images become tasks: class-incremental streams, and what a method may see of the task it is learning."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, overload

import numpy as np
import torch
from torch import Tensor

from lightcl.data.augment import random_crop_flip
from lightcl.data.partition import Share
from lightcl.data.sources import ImageSet, Source
from lightcl.errors import RequestError
from lightcl.seeds import derive, numpy_generator, torch_generator

if TYPE_CHECKING:
    from lightcl.scenario import Scenario


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


def class_order(scenario: Scenario, classes: int, device: int) -> list[int]:
    """The order in which a device meets the classes: as in the source, given, or shuffled by the scenario's seed.

    Raises RequestError for a given class that the source does not have.
    """
    order = scenario.stream.class_order
    if isinstance(order, tuple):
        if max(order) >= classes:
            raise RequestError(f"stream.class_order: the source has no class {max(order)} (it has 0..{classes - 1})")
        return list(order)
    if order == "natural":
        return list(range(classes))
    purpose = ("class-order", device) if scenario.stream.per_device_order else ("class-order",)
    return [int(c) for c in numpy_generator(scenario.seed, *purpose).permutation(classes)]


def build_stream(scenario: Scenario, source: Source, share: Share, device: int) -> TaskStream:
    """Cuts a device's share into tasks of `classes_per_task` classes.

    Under the pathological partition the tasks are cut from the classes that the device holds; otherwise from all
    classes; one that the device happens to lack stays among its task's answers, but it is not trained or tested on it.
    Raises RequestError where the classes do not suffice or a task has no sample.
    """
    wanted = scenario.stream.tasks * scenario.stream.classes_per_task
    train_labels, test_labels = source.train.labels[share.train], source.test.labels[share.test]
    held = set(np.unique(train_labels).tolist())
    order = class_order(scenario, len(source.classes), device)
    if scenario.fleet.partition == "pathological":
        order = [c for c in order if c in held]
    if wanted > len(order):
        holder = f"device {device} holds" if scenario.fleet.partition == "pathological" else "data.source has"
        raise RequestError(
            f"stream: {scenario.stream.tasks} tasks x {scenario.stream.classes_per_task} classes need {wanted} "
            f"classes, but {holder} {len(order)}"
        )
    tasks = []
    for number in range(scenario.stream.tasks):
        first = number * scenario.stream.classes_per_task
        classes = sorted(order[first : first + scenario.stream.classes_per_task])
        mine = share.train[np.isin(train_labels, classes)]
        test = share.test[np.isin(test_labels, [c for c in classes if c in held])]
        mine = numpy_generator(scenario.seed, "held-out", device, number).permutation(mine)
        out = round(len(mine) * scenario.stream.held_out)
        if scenario.stream.evaluate_on == "held-out" and out == 0:
            raise RequestError(
                f"stream.evaluate_on is held-out, but stream.held_out = {scenario.stream.held_out} of the {len(mine)} "
                f"images that device {device} has for task {number} is none; raise it"
            )
        if len(mine) - out < 2 or len(test) == 0:
            raise RequestError(
                f"device {device} has {len(mine) - out} training and {len(test)} test images for task {number} "
                f"(classes {classes}); at least 2 and 1 are needed: use "
                "fewer devices, a larger fleet.alpha, another seed, or fleet.test_data=whole"
            )
        tasks.append(
            Task(
                number,
                tuple(classes),
                Samples(source.train, np.sort(mine[out:])),
                Samples(source.train, np.sort(mine[:out])),
                Samples(source.test, test),
            )
        )
    return TaskStream(tasks, len(source.classes))


def training_batches(
    task: Task, size: int, seed: int, *, augmentation: str, padding: int, device: torch.device
) -> Iterator[Batch]:
    """One epoch of shuffled, augmented batches; the last one is dropped where a single sample would be left over.

    (Batch-norm has no variance over one value a channel.)
    """
    generator = torch_generator(seed, "batches")
    order = torch.randperm(len(task.train), generator=generator).numpy()
    for start in range(0, len(order), size):
        members = order[start : start + size]
        if len(members) < 2:
            return
        batch = task.train.load(members)
        images = batch.images
        if augmentation != "none":
            cropped = random_crop_flip(
                images.permute(0, 2, 3, 1), generator, padding=padding, flip=augmentation == "crop-flip"
            )
            images = cropped.permute(0, 3, 1, 2)
        yield Batch(images.to(device), batch.labels.to(device))
