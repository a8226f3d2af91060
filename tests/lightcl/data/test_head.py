"""The head has a row for every class of the fleet's streams, and for no other class of the source."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightcl.assembly import build_network, build_stream, fleet_head, stream_plan, stream_to_count
from lightcl.data.partition import Share, partition
from lightcl.data.sources import Source
from lightcl.data.streams import count_tasks, head_bounds, head_of
from lightcl.device.device import EdgeDevice
from lightcl.methods import METHODS
from tests.lightcl import toys

MANY = toys.source(classes=200, train=6, test=3)
"""200 classes, as Tiny-ImageNet has."""
FOURTEEN = {"tasks": 7, "classes_per_task": 2}


def share(source: Source, *classes: int) -> Share:
    """All images of these classes."""
    return Share(*(np.flatnonzero(np.isin(split.labels, classes)) for split in (source.train, source.test)))


def shared_head(classes: int = 200, **sections) -> tuple[int, ...]:
    scenario = toys.scenario(**sections)
    return head_of(stream_plan(scenario), toys.source(classes=classes, train=1, test=1), None)


def test_first_classes_of_the_source_in_natural_order() -> None:
    assert shared_head(stream=FOURTEEN) == tuple(range(14))


def test_listed_classes_are_sorted_and_those_beyond_the_last_task_left_out() -> None:
    stream = {"tasks": 2, "classes_per_task": 2, "class_order": (150, 3, 20, 7, 11)}
    assert shared_head(stream=stream) == (3, 7, 20, 150)


def test_all_classes_in_any_order_are_rows_numbered_as_in_the_source() -> None:
    for order in ("natural", "shuffled", (3, 1, 0, 2)):
        sections = {"stream": {"tasks": 2, "class_order": order}}
        assert shared_head(4, **sections) == (0, 1, 2, 3)
        stream = build_stream(toys.scenario(**sections), toys.source(), toys.whole(toys.source()), 0)
        assert [task.rows for task in stream] == [task.classes for task in stream]


def test_devices_with_orders_of_their_own_have_one_head() -> None:
    stream = {"tasks": 1, "classes_per_task": 2, "class_order": "shuffled", "per_device_order": True}
    sections = {"stream": stream, "fleet": {"devices": 3}}
    scenario = toys.scenario(**sections)
    held = toys.source(classes=50, train=3, test=1)
    learned = {
        label for d in range(3) for task in build_stream(scenario, held, toys.whole(held), d) for label in task.classes
    }
    assert 2 < len(learned) <= 6
    assert shared_head(50, **sections) == tuple(sorted(learned))


def test_union_of_the_streams_that_devices_cut_from_their_own_classes() -> None:
    """Tasks of two classes. Device 0 has 1, 5, 9: one task, (1, 5), and 9 is left over. Device 1 has 2, 5, 7, 8: two.

    Device 2 has 4 alone, too few for a task. The streams of the fleet have 1, 2, 5, 7, 8.
    """
    scenario = toys.scenario(stream={"tasks": 2, "cut": "own"}, fleet={"devices": 3})
    held = toys.source(classes=10, train=6, test=3)
    shares = [share(held, 1, 5, 9), share(held, 2, 5, 7, 8), share(held, 4)]
    plan = stream_plan(scenario)
    assert head_of(plan, held, shares) == (1, 2, 5, 7, 8)
    counts = count_tasks(plan, held, shares)
    assert counts.head == (1, 2, 5, 7, 8)
    stream = build_stream(scenario, held, shares[1], 1, counts.head)
    assert [task.classes for task in stream] == [(2, 5), (7, 8)]
    assert [task.rows for task in stream] == [(1, 2), (3, 4)]
    for task in stream:
        for samples in (task.train, task.held_out, task.test):
            assert samples.targets.tolist() == [counts.head.index(label) for label in samples.labels]
            assert set(samples.load().labels.tolist()) <= set(task.rows)


def test_boards_whose_images_nobody_else_knows_have_every_class_that_a_stream_may_use() -> None:
    own = {"stream": {"tasks": 2, "cut": "own"}}
    assert shared_head(10, **own) == tuple(range(10))
    listed = {"stream": {"tasks": 2, "cut": "own", "class_order": (8, 1, 4, 6, 3)}}
    assert shared_head(10, **listed) == (1, 3, 4, 6, 8)


def test_partition_decides_about_own_classes_alone() -> None:
    fleet = {"devices": 2, "partition": "pathological"}
    scenario = toys.scenario(fleet=fleet, stream={"tasks": 1})
    held = toys.source(classes=12, train=6, test=3)
    shares = partition(held, scenario.fleet, scenario.seed)
    met = sorted({int(label) for one in shares for label in held.train.labels[one.train]})
    assert 2 <= len(met) <= 4  # two devices with two classes each
    assert fleet_head(scenario, held) == tuple(met)
    assert fleet_head(scenario, held, own_data=True) == tuple(range(12))


@pytest.mark.parametrize(
    ("stream", "fleet", "bounds"),
    [
        (FOURTEEN, {}, (14, 14)),
        ({"class_order": "shuffled", "per_device_order": True}, {"devices": 5}, (4, 20)),
        ({"cut": "own"}, {"devices": 5}, (2, 100_000)),
        ({"cut": "own", "class_order": (4, 2, 1, 0, 7)}, {"devices": 5}, (2, 5)),
    ],
)
def test_bounds_of_a_head_from_the_scenario_alone(stream, fleet, bounds) -> None:
    assert head_bounds(stream_plan(toys.scenario(stream=stream, fleet=fleet))) == bounds


def test_devices_answer_with_classes_of_the_stream_alone(tmp_path) -> None:
    order = tuple(range(199, 185, -1))  # the last fourteen, so that no row has the number of its class
    scenario = toys.scenario(stream=FOURTEEN | {"class_order": order}, training={"epochs": 1})
    device = EdgeDevice(scenario, 0, tmp_path, source=MANY)
    assert device.network.head.weight.shape[0] == 14
    assert device.stream.head == tuple(range(186, 200))
    assert [task.rows for task in device.stream][:2] == [(12, 13), (10, 11)]
    for task in device.stream.ids[:2]:
        device.train(task, 1)
    tested = device.evaluate()
    # Against a count by hand, in the numbers of the source.
    for task, til, cil in zip(device.stream[:2], tested.til, tested.cil, strict=True):
        batch = task.test.load()
        with torch.no_grad():
            logits = device.method.predict(batch).float()
        among_all = np.asarray(device.stream.head)[logits.argmax(1).numpy()]
        assert set(among_all) <= set(order)
        assert cil == pytest.approx((among_all == task.test.labels).mean())
        of_task = [device.stream.head.index(label) for label in task.classes]
        chosen = np.asarray(task.classes)[logits[:, of_task].argmax(1).numpy()]
        assert til == pytest.approx((chosen == task.test.labels).mean())


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_learns_a_part_of_the_classes(tmp_path, name) -> None:
    stream = {"tasks": 2, "classes_per_task": 2, "class_order": (9, 5, 7, 2)}
    scenario = toys.scenario(stream=stream, method={"name": name}, training={"epochs": 1})
    held = toys.source(classes=10, train=20, test=5, size=16)
    device = EdgeDevice(scenario, 0, tmp_path, source=held)
    assert device.network.head.weight.shape[0] == 4
    for task in device.stream.ids[device.stream.first :]:
        device.train(task, 1)
    tested = device.evaluate()
    assert len(tested.til) == 2
    again = EdgeDevice(scenario, 0, tmp_path, source=held)  # what a method keeps fits after a restart
    assert again.evaluate().til == tested.til


def test_renumbering_the_classes_of_the_source_changes_no_figure(tmp_path) -> None:
    """Four classes of ten give what the same images give in a source that has only these four."""
    ten = toys.source(classes=10, train=20, test=5, size=16)
    chosen = (2, 5, 7, 9)
    parts = []
    for split in (ten.train, ten.test):
        members = np.isin(split.labels, chosen)
        labels = np.searchsorted(chosen, split.labels[members])
        parts.append(type(split)(split.images[members], labels, tuple(split.classes[c] for c in chosen)))
    four = Source(*parts)
    results = []
    for folder, held, order in (("ten", ten, chosen), ("four", four, (0, 1, 2, 3))):
        scenario = toys.scenario(stream={"tasks": 2, "class_order": order})
        device = EdgeDevice(scenario, 0, tmp_path / folder, source=held, share=share(held, *order))
        rows = []
        for task in device.stream.ids:
            rows.append((device.train(task, 2).loss, device.evaluate().til, device.evaluate().cil))
        results.append(rows)
    assert results[0] == results[1]


def test_footprint_counts_the_rows_of_the_head() -> None:
    from lightcl.analysis.footprint.comparison import footprint_of

    small, large = (
        footprint_of(toys.scenario(stream={"tasks": tasks}), MANY, None, measuring=False).counted for tasks in (2, 7)
    )
    assert stream_to_count(toys.scenario(stream=FOURTEEN), MANY).head_classes == 14
    network = build_network(toys.scenario(), in_channels=3, classes=14)
    per_row = 4 * (network.head.in_features + 1)
    assert large.to_json()["memory"]["parameters"] - small.to_json()["memory"]["parameters"] == 10 * per_row
