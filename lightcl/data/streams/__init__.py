"""How a device's images become its stream of tasks, and which tasks a device learns.

Each kind of stream has a file that defines its tasks (`class_incremental.py`; domain-incremental streams go beside it).
A stream whose images come with time is a class of its own (`field.py`). This module does what the others have in
common: held-out images, and the tasks that a device skips because it has too few images. `cut_stream` returns the tasks
with their images; `count_tasks` counts the same tasks and their images for the entire fleet from label counts alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from lightcl.data.images import Source
from lightcl.data.partition import Share, Shares, label_counts, train_counts
from lightcl.data.streams.class_incremental import class_groups, class_order, head_bounds, head_classes
from lightcl.data.streams.plan import StreamPlan
from lightcl.data.tasks import Samples, Skipped, Task, TaskStream
from lightcl.errors import RequestError
from lightcl.seeds import numpy_generator

__all__ = [
    "StreamPlan", "TaskCounts", "check_stream", "class_order", "count_tasks", "cut_stream", "head_bounds", "head_of",
    "learnable", "learnable_tasks",
]  # fmt: skip

SEEDS_TRIED = 5
"""Other seeds that are tried before an error advises one."""


@dataclass(frozen=True)
class TaskCounts:
    """How many images every device of a fleet has for every task of the scenario, `[devices, tasks]` each."""

    plan: StreamPlan
    train: np.ndarray
    """Training images without the held-out ones."""
    held_out: np.ndarray
    test: np.ndarray
    """Images of the test split, only of classes for which the device has training images."""
    cut: np.ndarray
    """Whether the device has a task of this number: with `stream.cut: own` it may hold too few classes."""
    head: tuple[int, ...]
    """The classes of all streams of the fleet: the rows of the head (`head_of`)."""

    @property
    def tested(self) -> np.ndarray:
        """Images that a device is tested on: those of `stream.evaluate_on`."""
        return self.test if self.plan.stream.evaluate_on == "test" else self.held_out

    @cached_property
    def learned(self) -> np.ndarray:
        """Whether the device learns the task."""
        return _enough(self.plan, self.train + self.held_out, self.test)

    @cached_property
    def tasks(self) -> list[tuple[int, ...]]:
        """The numbers of the tasks that each device learns: `cut_stream(...).ids`."""
        return [tuple(np.flatnonzero(row).tolist()) for row in self.learned]

    @property
    def train_used(self) -> np.ndarray:
        """Images that each device trains on, `[devices]`: those of tasks that it skips do not count."""
        used: np.ndarray = (self.train * self.learned).sum(axis=1)
        return used

    @property
    def tested_used(self) -> np.ndarray:
        """Images that each device is tested on, `[devices]`, of the tasks that it learns."""
        used: np.ndarray = (self.tested * self.learned).sum(axis=1)
        return used

    def skipped(self, device: int) -> list[Skipped]:
        """The tasks that a device does not learn, with the reason in a few words."""
        skipped = []
        for number in np.flatnonzero(~self.learned[device]).tolist():
            train = int(self.train[device, number])
            reason = _reason(self.plan, train) if self.cut[device, number] else _too_few_classes(self.plan)
            skipped.append(Skipped(number, reason, train, int(self.test[device, number])))
        return skipped


def head_of(plan: StreamPlan, source: Source, shares: Sequence[Share] | None) -> tuple[int, ...]:
    """The classes that the rows of the head stand for, ascending: those of all streams of the fleet.

    Only under `stream.cut: own` does it depend on the images of each device (`shares[d]` is device d's). None: the
    images of the fleet are not known, as with boards that have their own; the head then has every class that a stream
    may use. Raises RequestError as `cut_stream` does.
    """
    present = None
    if shares is not None and plan.own_classes:
        present = train_counts(source, shares) > 0
    return head_classes(plan, len(source.classes), present)


def cut_stream(
    plan: StreamPlan, source: Source, share: Share, device: int, head: Sequence[int] | None = None
) -> TaskStream:
    """Cuts a device's share into tasks; tasks with too few images are skipped and listed in `skipped`.

    `head` are the classes of the head (`head_of`); None: those of a fleet whose images are not known. A device is
    tested only on classes for which it has training images. Raises RequestError where the plan works for no device:
    too few classes, or a crop that may miss the image.
    """
    _check_padding(plan, source)
    head = head_of(plan, source, None) if head is None else head
    rows = np.full(len(source.classes), -1)
    rows[list(head)] = np.arange(len(head))
    labels, test_labels = source.train.labels[share.train], source.test.labels[share.test]
    present = np.bincount(labels, minlength=len(source.classes)) > 0
    tasks, skipped = [], []
    for number, classes in enumerate(class_groups(plan, device, present)):
        if classes is None:
            skipped.append(Skipped(number, _too_few_classes(plan), 0, 0))
            continue
        chosen = np.zeros(len(source.classes), dtype=bool)
        chosen[list(classes)] = True
        members = share.train[chosen[labels]]
        test = share.test[(chosen & present)[test_labels]]
        out = int(_held_out(plan, np.asarray(len(members))))
        if out:
            members = numpy_generator(plan.seed, "held-out", device, number).permutation(members)
        if not _enough(plan, np.asarray(len(members)), np.asarray(len(test))):
            train = len(members) - out
            skipped.append(Skipped(number, _reason(plan, train), train, len(test)))
            continue
        tasks.append(
            Task(
                number,
                classes,
                Samples(source.train, np.sort(members[out:]), rows),
                Samples(source.train, np.sort(members[:out]), rows),
                Samples(source.test, test, rows),
            )
        )
    return TaskStream(tasks, head, plan.joint, tuple(skipped))


def learnable(plan: StreamPlan, source: Source, share: Share, device: int) -> tuple[int, ...]:
    """The numbers of the tasks that a device learns: `cut_stream(...).ids`, from label counts alone."""
    return _task_counts(plan, *label_counts(source, [share]), [device]).tasks[0]


def learnable_tasks(plan: StreamPlan, source: Source, shares: Sequence[Share]) -> list[tuple[int, ...]]:
    """`learnable` for every device of a fleet at once (`shares[d]` is device d's)."""
    return _task_counts(plan, *label_counts(source, shares), range(len(shares))).tasks


def check_stream(plan: StreamPlan, source: Source, shares: Sequence[Share]) -> list[tuple[int, ...]]:
    """`learnable_tasks`; raises RequestError as `count_tasks` does."""
    return count_tasks(plan, source, shares).tasks


def count_tasks(plan: StreamPlan, source: Source, shares: Sequence[Share]) -> TaskCounts:
    """Images of every device for every task (`shares[d]` is device d's); no image is read.

    Raises RequestError where no device can learn anything, as `cut_stream` does otherwise.
    """
    _check_padding(plan, source)
    train, test = label_counts(source, shares)
    found = _task_counts(plan, train, test, range(len(shares)))
    if found.learned.any():
        return found
    device, number, classes = _nearest_to_learning(plan, train, test, found)
    if classes is None:
        raise RequestError(
            f"no device can learn a task: none holds the {plan.stream.classes_per_task} classes of one; lower "
            "stream.classes_per_task, or set stream.cut: shared"
        )
    task = np.asarray(classes)
    images = int(train[device, task].sum())
    tests = int(test[device, task[train[device, task] > 0]].sum())
    used = images - int(_held_out(plan, np.asarray(images)))
    raise RequestError(
        f"no device can learn a task: device {device}, which comes closest, has {used} training and {tests} test "
        f"images for task {number} (classes {list(classes)}); {_reason(plan, used)}: "
        f"{_advice(plan, source, classes, images)}"
    )


# -- which tasks a device learns -----------------------------------------------------------------------------------


def _held_out(plan: StreamPlan, images: np.ndarray) -> np.ndarray:
    """How many of a device's `images` for a task are kept out of training (any shape)."""
    return np.rint(images * plan.stream.held_out).astype(np.int64)


def _enough(plan: StreamPlan, images: np.ndarray, tests: np.ndarray) -> np.ndarray:
    """Whether a device learns a task for which it has `images` training and `tests` test images (any shape)."""
    out = _held_out(plan, images)
    tested = tests if plan.stream.evaluate_on == "test" else out
    enough: np.ndarray = (images - out >= plan.stream.min_samples) & (tested >= 1)
    return enough


def _reason(plan: StreamPlan, train: int) -> str:
    """Why a device does not learn a task for which it has `train` training images without the held-out ones."""
    if train < plan.stream.min_samples:
        return f"fewer than {plan.stream.min_samples} training images"
    return "no test image" if plan.stream.evaluate_on == "test" else "no held-out image"


def _too_few_classes(plan: StreamPlan) -> str:
    """Why a device does not have a task, under `stream.cut: own`."""
    return f"fewer than {plan.stream.classes_per_task} classes left"


def _task_counts(plan: StreamPlan, train: np.ndarray, test: np.ndarray, devices: Sequence[int]) -> TaskCounts:
    """The counts of `devices` with these images per class (`[devices, C]` each)."""
    images, tests, cut = _images_per_task(plan, train, test, devices)
    out = _held_out(plan, images)
    head = head_classes(plan, train.shape[1], train > 0)
    return TaskCounts(plan, images - out, out, tests, cut, head)


def _images_per_task(
    plan: StreamPlan, train: np.ndarray, test: np.ndarray, devices: Sequence[int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Training images (held-out ones included), test images, and whether the task exists, `[devices, tasks]` each."""
    test = np.where(train > 0, test, 0)  # only classes that a device learns are tested
    if not plan.own_classes and not plan.stream.per_device_order:  # the same groups on all devices
        groups = class_groups(plan, 0, np.ones(train.shape[1], dtype=bool))
        columns = [list(group or ()) for group in groups]
        images = np.stack([train[:, chosen].sum(axis=1) for chosen in columns], axis=1)
        tests = np.stack([test[:, chosen].sum(axis=1) for chosen in columns], axis=1)
        return images, tests, np.ones(images.shape, dtype=bool)
    images = np.zeros((len(train), plan.stream.tasks), dtype=np.int64)
    tests, cut = np.zeros_like(images), np.zeros(images.shape, dtype=bool)
    for row, device in enumerate(devices):
        full = [list(group) for group in class_groups(plan, device, train[row] > 0) if group is not None]
        if full:  # without a full group of classes a task has no image that counts
            images[row, : len(full)] = train[row, np.asarray(full)].sum(axis=1)
            tests[row, : len(full)] = test[row, np.asarray(full)].sum(axis=1)
        cut[row, : len(full)] = True
    return images, tests, cut


# -- invalid requests ----------------------------------------------------------------------------------------------


def _check_padding(plan: StreamPlan, source: Source) -> None:
    """Raises RequestError for padding as large as the image: a crop could then miss the image."""
    side, padding = min(source.train.images.shape[1:3]), plan.data.crop_padding
    if plan.data.augmentation_kind != "none" and padding >= side:
        raise RequestError(f"data.crop_padding is {padding}, but the images have {side} pixels per side; allowed: less")


def _nearest_to_learning(
    plan: StreamPlan, train: np.ndarray, test: np.ndarray, counts: TaskCounts
) -> tuple[int, int, tuple[int, ...] | None]:
    """The device and task with the most training images (tasks with a test image first), and the task's classes."""
    images, tests = counts.train + counts.held_out, counts.test
    best = int(np.argmax(images + (tests > 0) * (images.max() + 1)))
    device, number = divmod(best, plan.stream.tasks)
    return device, number, class_groups(plan, device, train[device] > 0)[number]


def _seed_that_helps(plan: StreamPlan, source: Source) -> int | None:
    """The first of a few other seeds under which a device of the fleet can learn a task; None where none helps."""
    for seed in range(plan.seed + 1, plan.seed + 1 + SEEDS_TRIED):
        other = replace(plan, seed=seed)
        try:
            counts = Shares.tried(source, plan.fleet, seed).label_counts()
        except RequestError:
            continue
        if _task_counts(other, *counts, range(plan.fleet.devices)).learned.any():
            return seed
    return None


def _advice(plan: StreamPlan, source: Source, classes: Sequence[int], images: int) -> str:
    """How a task of `classes`, for which a device has `images` training images, can get enough of them."""
    available = np.unique(source.train.labels)
    if not np.isin(available, classes).any():
        some = ", ".join(str(c) for c in available[:8]) + (", ..." if len(available) > 8 else "")
        return f"data.source has no training images of them; choose others by stream.class_order (it has {some})"
    if not np.isin(source.test.labels, classes).any():
        return "data.source has no test images of them; raise data.test_fraction"
    train, least = images - int(_held_out(plan, np.asarray(images))), plan.stream.min_samples
    if train < least <= images:
        return "lower stream.held_out"
    if plan.stream.evaluate_on == "held-out" and train >= least:
        return "raise stream.held_out"
    ways = ["use fewer devices"]
    if plan.fleet.partition in ("dirichlet", "inner-dirichlet"):
        ways += ["a larger fleet.alpha"]
        if (seed := _seed_that_helps(plan, source)) is not None:
            ways += [f"another seed (seed: {seed} works)"]
    if least > 2:
        ways += ["a lower stream.min_samples"]
    if plan.fleet.test_data == "share" and train >= least:  # test images are short
        ways += ["fleet.test_data=matched", "fleet.test_data=whole"]
    return ", ".join(ways[:-1]) + (" or " if ways[1:] else "") + ways[-1]
