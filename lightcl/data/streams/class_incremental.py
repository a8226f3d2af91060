"""Class-incremental streams: every task brings new classes."""

from __future__ import annotations

import numpy as np

from lightcl.data.streams.plan import StreamPlan
from lightcl.errors import RequestError
from lightcl.seeds import numpy_generator

MOST_CLASSES = 100_000
"""Classes that a source may have."""


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


def head_classes(plan: StreamPlan, classes: int, present: np.ndarray | None) -> tuple[int, ...]:
    """The classes of all streams of the fleet, ascending: what the rows of the head stand for.

    `classes` is how many the source has. `present` `[devices, C]` says which device has training images of which class;
    only `stream.cut: own` looks at it. None: nobody knows of all devices, and under `cut: own` the head has every class
    that the stream may use. Raises RequestError where the classes do not suffice for any device.
    """
    size, tasks = plan.stream.classes_per_task, plan.stream.tasks
    possible = class_order(plan, classes, 0)
    _check_classes(plan, len(possible))
    if not plan.own_classes and not plan.stream.per_device_order:
        return tuple(sorted(possible[: tasks * size]))
    found: set[int] = set()
    if not plan.own_classes:
        for device in range(plan.fleet.devices):
            found.update(class_order(plan, classes, device)[: tasks * size])
            if len(found) == len(possible):
                break
    elif present is not None:
        for device, row in enumerate(present if plan.stream.per_device_order else np.unique(present, axis=0)):
            found.update(label for group in class_groups(plan, device, row) for label in group or ())
            if len(found) == len(possible):
                break
    return tuple(sorted(found or possible))


def head_bounds(plan: StreamPlan) -> tuple[int, int]:
    """The least and the most classes that the head of a fleet can have under a plan, whatever the source."""
    section = plan.stream
    if plan.data.classes is not None:  # a field source's: all of them, on every board
        return len(plan.data.classes), len(plan.data.classes)
    wanted = section.tasks * section.classes_per_task
    listed = len(section.class_order) if isinstance(section.class_order, tuple) else None
    if plan.own_classes:  # boards with images of their own have every class of the source that the stream may use
        return section.classes_per_task, listed or MOST_CLASSES
    return wanted, wanted * plan.fleet.devices if section.per_device_order else wanted


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
