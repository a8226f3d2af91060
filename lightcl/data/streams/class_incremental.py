"""Class-incremental streams: every task brings new classes."""

from __future__ import annotations

import numpy as np

from lightcl.data.streams.plan import StreamPlan
from lightcl.errors import RequestError
from lightcl.seeds import numpy_generator


def class_order(plan: StreamPlan, classes: int, device: int) -> list[int]:
    """The order in which a device learns the classes: as in the source, given, or shuffled by the scenario's seed.

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


def class_groups(plan: StreamPlan, device: int, present: np.ndarray) -> list[tuple[int, ...] | None]:
    """The sorted classes of each of a device's tasks.

    `present` `[C]` says for which classes the device has training images. With `stream.cut: own`, only these are cut
    into tasks; a task for which no full group of classes is left is None. Otherwise all devices have the same groups (a
    class that a device lacks still counts among its task's classes). Raises RequestError where there are too few
    classes for every device.
    """
    size, tasks = plan.stream.classes_per_task, plan.stream.tasks
    order = class_order(plan, len(present), device)
    _check_classes(plan, len(order))
    if plan.own_classes:
        order = [label for label in order if present[label]]
    groups = [tuple(sorted(order[first : first + size])) for first in range(0, tasks * size, size)]
    return [group if len(group) == size else None for group in groups]


def _check_classes(plan: StreamPlan, available: int) -> None:
    """Raises RequestError where no device has the classes that the stream needs."""
    tasks, size = plan.stream.tasks, plan.stream.classes_per_task
    limit, holder = available, f"data.source has {available}"
    advice = "lower stream.tasks or stream.classes_per_task"
    per_device = plan.fleet.classes_per_device
    if plan.own_classes and per_device is not None and per_device < available:
        limit, holder = per_device, f"a device holds fleet.classes_per_device = {per_device}"
        advice += ", or raise fleet.classes_per_device"
    if tasks * size > limit:
        raise RequestError(
            f"stream: {tasks} tasks x {size} classes need {tasks * size} classes, but {holder}; {advice}"
        )
