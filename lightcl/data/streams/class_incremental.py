"""How images become tasks: a device's share, cut into a class-incremental stream, and its batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from lightcl.data.augment import Augmentation, augmented
from lightcl.data.partition import Share
from lightcl.data.section import Data, Fleet, Stream
from lightcl.data.sources import Source
from lightcl.data.tasks import Batch, Samples, Task, TaskStream
from lightcl.errors import RequestError
from lightcl.seeds import numpy_generator, torch_generator


@dataclass(frozen=True)
class StreamPlan:
    """What decides how a device's images become tasks; `joint` is whether all tasks are learned together, as one."""

    data: Data
    stream: Stream
    fleet: Fleet
    seed: int
    joint: bool = False


def class_order(plan: StreamPlan, classes: int, device: int) -> list[int]:
    """The order in which a device meets the classes: as in the source, given, or shuffled by the scenario's seed.

    Raises RequestError for a given class that the source does not have.
    """
    order = plan.stream.class_order
    if isinstance(order, tuple):
        if max(order) >= classes:
            raise RequestError(f"stream.class_order: the source has no class {max(order)} (it has 0..{classes - 1})")
        return list(order)
    if order == "natural":
        return list(range(classes))
    purpose = ("class-order", device) if plan.stream.per_device_order else ("class-order",)
    return [int(c) for c in numpy_generator(plan.seed, *purpose).permutation(classes)]


def cut_stream(plan: StreamPlan, source: Source, share: Share, device: int) -> TaskStream:
    """Cuts a device's share into tasks of `classes_per_task` classes.

    Under the pathological partition the tasks are cut from the classes that the device holds; otherwise from all
    classes; one that the device happens to lack stays among its task's answers, but it is not trained or tested on it.
    Raises RequestError where the classes do not suffice or a task has no sample.
    """
    _check_padding(plan, source)
    wanted = plan.stream.tasks * plan.stream.classes_per_task
    train_labels, test_labels = source.train.labels[share.train], source.test.labels[share.test]
    held = set(np.unique(train_labels).tolist())
    order = class_order(plan, len(source.classes), device)
    if plan.fleet.partition == "pathological":
        order = [c for c in order if c in held]
    if wanted > len(order):
        holder, advice = "data.source has", "lower stream.tasks or stream.classes_per_task"
        if plan.fleet.partition == "pathological":
            holder, advice = f"device {device} holds", f"{advice}, or raise fleet.classes_per_device"
        raise RequestError(
            f"stream: {plan.stream.tasks} tasks x {plan.stream.classes_per_task} classes need {wanted} "
            f"classes, but {holder} {len(order)}; {advice}"
        )
    tasks = []
    for number in range(plan.stream.tasks):
        first = number * plan.stream.classes_per_task
        classes = sorted(order[first : first + plan.stream.classes_per_task])
        mine = share.train[np.isin(train_labels, classes)]
        test = share.test[np.isin(test_labels, [c for c in classes if c in held])]
        mine = numpy_generator(plan.seed, "held-out", device, number).permutation(mine)
        out = round(len(mine) * plan.stream.held_out)
        if plan.stream.evaluate_on == "held-out" and out == 0:
            raise RequestError(
                f"stream.evaluate_on is held-out, but stream.held_out = {plan.stream.held_out} of the {len(mine)} "
                f"images that device {device} has for task {number} is none; raise it"
            )
        if len(mine) - out < 2 or len(test) == 0:
            advice = _advice(plan, source, classes, len(mine), out)
            raise RequestError(
                f"device {device} has {len(mine) - out} training and {len(test)} test images for task {number} "
                f"(classes {classes}); at least 2 and 1 are needed: {advice}"
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
    return TaskStream(tasks, len(source.classes), plan.joint)


def _check_padding(plan: StreamPlan, source: Source) -> None:
    """A crop that is shifted by more than the image shows nothing of it."""
    side, padding = min(source.train.images.shape[1:3]), plan.data.crop_padding
    if plan.data.augmentation_kind != "none" and padding >= side:
        raise RequestError(f"data.crop_padding is {padding}, but the images have {side} pixels a side; allowed: less")


def _advice(plan: StreamPlan, source: Source, classes: list[int], images: int, held_out: int) -> str:
    """What gives a task of `classes`, of which a device has `images`, enough of them."""
    there = np.unique(source.train.labels)
    if not np.isin(there, classes).any():
        some = ", ".join(str(c) for c in there[:8]) + (", ..." if len(there) > 8 else "")
        return f"data.source has no training images of them; choose others by stream.class_order (it has {some})"
    if not np.isin(source.test.labels, classes).any():
        return "data.source has no test images of them; raise data.test_fraction"
    if images - held_out < 2 <= images:
        return "lower stream.held_out"
    ways = ["use fewer devices"]
    if plan.fleet.partition == "dirichlet":
        ways += ["a larger fleet.alpha", "another seed"]
    if plan.fleet.test_data == "share" and images - held_out >= 2:  # it is test images that are short
        ways += ["fleet.test_data=whole"]
    return ", ".join(ways[:-1]) + (" or " if ways[1:] else "") + ways[-1]


def training_batches(
    samples: Samples, size: int, seed: int, *, augmentation: Augmentation, padding: int, device: torch.device
) -> Iterator[Batch]:
    """One epoch of shuffled, augmented batches; the last one is dropped where a single sample would be left over.

    (Batch-norm has no variance over one value a channel.)
    """
    generator = torch_generator(seed, "batches")
    order = torch.randperm(len(samples), generator=generator).numpy()
    for start in range(0, len(order), size):
        members = order[start : start + size]
        if len(members) < 2:
            return
        batch = samples.load(members)
        images = augmented(batch.images, generator, augmentation, padding)
        yield Batch(images.to(device), batch.labels.to(device), torch.from_numpy(members))
