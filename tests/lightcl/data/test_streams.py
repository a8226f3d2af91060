"""Images become tasks: which classes, which samples, in which order and batches."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from lightcl.assembly import build_stream, stream_plan, tasks_of_fleet
from lightcl.data.batches import training_batches
from lightcl.data.images import Source
from lightcl.data.partition import Share, partition
from lightcl.data.streams import class_order, cut_stream, learnable, learnable_tasks
from lightcl.data.tasks import TaskContext, TaskStream
from lightcl.errors import RequestError
from tests.lightcl import toys


@pytest.fixture(scope="module")
def source() -> Source:
    return toys.source(classes=6, train=40, test=10)


def stream_of(source: Source, device: int = 0, share: Share | None = None, **sections) -> TaskStream:
    sections = {"stream": {"tasks": 3}} | sections
    return build_stream(toys.scenario(**sections), source, share or toys.whole(source), device)


def classes_of(stream: TaskStream) -> list[tuple[int, ...]]:
    return [task.classes for task in stream]


def test_tasks_take_the_classes_in_turn(source):
    stream = stream_of(source)
    assert [task.id for task in stream] == [0, 1, 2]
    assert classes_of(stream) == [(0, 1), (2, 3), (4, 5)]
    assert stream.head_classes == 6
    for task in stream:
        assert (len(task.train), len(task.held_out), len(task.test)) == (72, 8, 20)  # 80 images, 10 % held out


def test_every_sample_is_in_the_task_of_its_label(source):
    for task in stream_of(source):
        for samples in (task.train, task.held_out, task.test):
            assert set(samples.load().labels.tolist()) == set(task.classes)


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "pathological"])
def test_samples_of_all_devices_and_tasks_are_disjoint(source, kind):
    fleet = {"devices": 3, "partition": kind} | ({"alpha": 50.0} if kind == "dirichlet" else {})
    sections = {"fleet": fleet, "stream": {"tasks": 2}}
    shares = partition(source, toys.scenario(**sections).fleet, 0)
    streams = [stream_of(source, device, share, **sections) for device, share in enumerate(shares)]
    tasks = [task for stream in streams for task in stream]
    used = np.concatenate([part.indices for task in tasks for part in (task.train, task.held_out)])
    assert len(np.unique(used)) == len(used)
    tested = np.concatenate([task.test.indices for task in tasks])
    assert len(np.unique(tested)) == len(tested)
    for stream, share in zip(streams, shares, strict=True):
        mine = np.concatenate([part.indices for task in stream for part in (task.train, task.held_out)])
        assert np.isin(mine, share.train).all()
        assert all(np.isin(task.test.indices, share.test).all() for task in stream)


@pytest.mark.parametrize(("share", "held_out"), [(0.0, 0), (0.1, 8), (0.25, 20), (0.5, 40)])
def test_held_out_samples_are_kept_out_of_training(source, share, held_out):
    for task in stream_of(source, stream={"tasks": 3, "held_out": share}):
        assert len(task.held_out) == held_out
        both = np.concatenate([task.train.indices, task.held_out.indices])
        expected = np.flatnonzero(np.isin(source.train.labels, task.classes))
        assert np.array_equal(np.sort(both), expected)


def test_held_out_samples_are_a_function_of_seed_and_device(source):
    first = stream_of(source)[0].held_out.indices
    assert np.array_equal(stream_of(source)[0].held_out.indices, first)
    assert not np.array_equal(stream_of(source, device=1)[0].held_out.indices, first)
    assert not np.array_equal(stream_of(source, seed=1)[0].held_out.indices, first)


# -- order of classes ----------------------------------------------------------------------------------------------


def order(device: int = 0, seed: int = 0, **stream) -> list[int]:
    return class_order(toys.scenario(seed=seed, stream=stream), 10, device)


def test_natural_order_is_the_sources():
    assert order(class_order="natural") == list(range(10))


def test_shuffled_order_is_the_same_on_all_devices():
    shuffled = order(class_order="shuffled")
    assert sorted(shuffled) == list(range(10))
    assert shuffled != list(range(10))
    assert order(device=1, class_order="shuffled") == shuffled
    assert order(seed=1, class_order="shuffled") != shuffled


def test_each_device_has_its_own_order_on_request():
    orders = [order(device, class_order="shuffled", per_device_order=True) for device in range(4)]
    assert len({tuple(o) for o in orders}) == 4
    assert all(sorted(o) == list(range(10)) for o in orders)
    assert order(2, class_order="shuffled", per_device_order=True) == orders[2]


def test_a_listed_order_is_used_unchanged(source):
    stream = stream_of(source, stream={"tasks": 2, "class_order": (5, 0, 3, 1)})
    assert classes_of(stream) == [(0, 5), (1, 3)]


def test_listed_class_that_the_source_does_not_have_is_refused(source):
    with pytest.raises(RequestError, match=r"stream.class_order: the source has no class 6 \(it has 0\.\.5\)"):
        stream_of(source, stream={"tasks": 2, "class_order": (5, 0, 3, 6)})


def test_pathological_devices_make_tasks_of_their_own_classes(source):
    sections = {"fleet": {"devices": 6, "partition": "pathological"}, "stream": {"tasks": 2}}
    shares = partition(source, toys.scenario(**sections).fleet, 0)
    met = set()
    for device, share in enumerate(shares):
        stream = stream_of(source, device, share, **sections)
        held = set(source.train.labels[share.train].tolist())
        assert len(held) == 4
        assert set().union(*classes_of(stream)) == held
        assert all(len(task.classes) == 2 for task in stream)
        met.add(tuple(classes_of(stream)))
    assert len(met) > 1


def test_a_class_that_a_device_lacks_stays_in_its_task_but_is_not_tested(source):
    """Otherwise any network would classify a task of one class correctly."""
    share = Share(np.flatnonzero(source.train.labels != 3), np.arange(len(source.test)))
    stream = stream_of(source, share=share)
    assert classes_of(stream) == [(0, 1), (2, 3), (4, 5)]
    for samples in (stream[1].train, stream[1].held_out, stream[1].test):
        assert set(samples.load().labels.tolist()) <= {2}


# -- tasks that a device skips -------------------------------------------------------------------------------------


def share_of_counts(source: Source, train: list[int], test: list[int]) -> Share:
    """The first so many training and test images of class 0, 1, ..."""

    def first(labels: np.ndarray, counts: list[int]) -> np.ndarray:
        return np.sort(np.concatenate([np.flatnonzero(labels == c)[:count] for c, count in enumerate(counts)]))

    return Share(first(source.train.labels, train), first(source.test.labels, test))


def test_tasks_with_too_few_images_are_skipped(source):
    """Tasks (0, 1), (2, 3), (4, 5): one image of task 0; four of task 1; three of task 2, whose class 5 is tested."""
    share = share_of_counts(source, [1, 0, 2, 2, 0, 3], [9, 9, 1, 0, 9, 2])
    stream = stream_of(source, 5, share)
    assert stream.ids == (1, 2)
    assert [task.id for task in stream] == [1, 2]
    assert [(len(task.train), len(task.held_out), len(task.test)) for task in stream] == [(4, 0, 1), (3, 0, 2)]
    (skipped,) = stream.skipped
    assert (skipped.task, skipped.train, skipped.test) == (0, 1, 9)  # of class 0; the device does not have class 1
    assert skipped.reason == "fewer than 2 training images"


def test_a_task_without_test_images_is_skipped(source):
    stream = stream_of(source, 5, share_of_counts(source, [5, 5, 5, 5, 5, 5], [0, 0, 1, 0, 0, 1]))
    assert stream.ids == (1, 2)
    (skipped,) = stream.skipped
    assert (skipped.reason, skipped.train, skipped.test) == ("no test image", 9, 0)  # one of ten is held out


def test_a_task_whose_tested_class_is_not_trained_is_skipped(source):
    stream = stream_of(source, 5, share_of_counts(source, [5, 0, 5, 5, 5, 5], [0, 9, 1, 1, 1, 1]))
    assert stream.ids == (1, 2)


@pytest.mark.parametrize(("least", "ids"), [(2, (0, 1, 2)), (3, (1, 2)), (9, (1, 2)), (10, (2,)), (19, ())])
def test_min_samples_counts_training_images_after_the_held_out_ones(source, least, ids):
    """2, 10 and 20 images; 0, 1 and 2 of them are held out: 2, 9 and 18 are trained on."""
    share = share_of_counts(source, [2, 0, 5, 5, 10, 10], [9] * 6)
    stream = stream_of(source, share=share, stream={"tasks": 3, "min_samples": least})
    assert stream.ids == ids
    assert len(stream.skipped) == 3 - len(ids)


def test_a_device_without_images_has_an_empty_stream(source):
    nothing = Share(np.empty(0, dtype=int), np.empty(0, dtype=int))
    for sections in ({}, {"method": {"name": "joint"}}, {"fleet": {"partition": "pathological"}}):
        stream = stream_of(source, share=nothing, **sections)
        assert (len(stream), stream.ids, stream.first) == (0, (), 0)
        assert [skipped.task for skipped in stream.skipped] == [0, 1, 2]


def test_joint_training_learns_the_tasks_that_are_not_skipped(source):
    share = share_of_counts(source, [4, 4, 0, 0, 4, 4], [2] * 6)
    stream = stream_of(source, share=share, method={"name": "joint"})
    assert stream.ids == (0, 2)
    merged = stream.to_learn(stream.first)
    assert (merged.id, merged.classes) == (2, (0, 1, 4, 5))


def test_evaluation_on_held_out_images_needs_some(source):
    """10 % of four images are none; 10 % of ten are one. Test images are not needed."""
    share = share_of_counts(source, [2, 2, 5, 5, 5, 5], [1, 1, 0, 0, 0, 0])
    stream = stream_of(source, share=share, stream={"tasks": 3, "evaluate_on": "held-out"})
    assert stream.ids == (1, 2)
    assert stream.skipped[0].reason == "no held-out image"


def test_own_classes_are_cut_into_full_groups(source):
    share = share_of_counts(source, [0, 4, 4, 4, 0, 4], [2] * 6)
    stream = stream_of(source, 3, share, stream={"tasks": 3, "cut": "own"})
    assert classes_of(stream) == [(1, 2), (3, 5)]
    assert stream.skipped[0].reason == "fewer than 2 classes left"
    assert classes_of(stream_of(source, 3, share, stream={"tasks": 3, "cut": "shared"})) == [(0, 1), (2, 3), (4, 5)]
    odd = share_of_counts(source, [0, 4, 4, 4, 0, 0], [2] * 6)  # class 3 alone is no task
    assert classes_of(stream_of(source, 3, odd, stream={"tasks": 3, "cut": "own"})) == [(1, 2)]


def test_own_classes_are_the_default_where_devices_get_few_classes():
    for kind, own in (("iid", False), ("dirichlet", False), ("pathological", True), ("distribution", True)):
        plan = stream_plan(toys.scenario(fleet={"partition": kind}))
        assert plan.own_classes == own
    assert not stream_plan(toys.scenario(fleet={"partition": "pathological"}, stream={"cut": "shared"})).own_classes


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("test_data", ["share", "whole", "matched"])
@pytest.mark.parametrize(
    ("fleet", "stream"),
    [
        ({"partition": "dirichlet", "alpha": 0.3}, {}),
        ({"partition": "dirichlet", "alpha": 0.3}, {"cut": "own", "class_order": "shuffled"}),
        ({"partition": "dirichlet", "alpha": 0.1}, {"class_order": "shuffled", "per_device_order": True}),
        ({"partition": "inner-dirichlet", "alpha": 0.3}, {"min_samples": 5, "held_out": 0.35}),
        ({"partition": "iid"}, {"evaluate_on": "held-out"}),
        ({"partition": "pathological"}, {"per_device_order": True, "class_order": "shuffled"}),
        ({"partition": "distribution"}, {"held_out": 0.5}),
        ({"partition": "exponential"}, {"cut": "own"}),
    ],
)
def test_learnable_tasks_are_those_of_the_stream(source, fleet, stream, test_data, seed):
    sections = {"fleet": {"devices": 25, "test_data": test_data} | fleet, "stream": {"tasks": 2} | stream}
    scenario = toys.scenario(seed=seed, **sections)
    plan, shares = stream_plan(scenario), partition(source, scenario.fleet, seed)
    expected = [cut_stream(plan, source, share, device).ids for device, share in enumerate(shares)]
    assert learnable_tasks(plan, source, shares) == expected
    assert learnable_tasks(plan, source, list(shares)) == expected
    assert [learnable(plan, source, share, device) for device, share in enumerate(shares)] == expected
    assert tasks_of_fleet(scenario, source, shares) == expected
    assert any(expected)


# -- streams that no device can learn ------------------------------------------------------------------------------


def fleet_of(source: Source, *shares: Share, **sections) -> list[tuple[int, ...]]:
    sections = {"stream": {"tasks": 3}} | sections
    return tasks_of_fleet(toys.scenario(**sections), source, shares)


def test_a_fleet_in_which_one_device_learns_one_task_is_not_refused(source):
    nothing = Share(np.empty(0, dtype=int), np.empty(0, dtype=int))
    assert fleet_of(source, nothing, share_of_counts(source, [0, 0, 2], [0, 0, 1])) == [(), (1,)]


def test_more_classes_than_the_source_has_are_refused(source):
    with pytest.raises(RequestError, match=r"4 tasks x 2 classes need 8 classes, but data.source has 6; lower"):
        stream_of(source, stream={"tasks": 4})


def test_more_classes_than_a_pathological_device_holds_are_refused(source):
    sections = {"fleet": {"partition": "pathological", "classes_per_device": 2}, "stream": {"tasks": 2}}
    with pytest.raises(RequestError, match=r"need 4 classes, but a device holds fleet.classes_per_device = 2; lower"):
        stream_of(source, **sections)


def test_devices_without_a_full_group_of_classes_are_refused(source):
    share = share_of_counts(source, [9], [9])
    with pytest.raises(RequestError, match=r"no device can learn a task: none holds the 2 classes of one; lower"):
        fleet_of(source, share, stream={"tasks": 3, "cut": "own"})


@pytest.mark.parametrize(
    ("train", "test", "found"),
    [
        ([1], [1, 1], "1 training and 1 test"),  # of class 0 only, so class 1 is not tested either
        ([], [1], "0 training and 0 test"),
        ([2, 2], [], "4 training and 0 test"),
    ],
)
def test_a_fleet_without_samples_is_refused(source, train, test, found):
    nothing = Share(np.empty(0, dtype=int), np.empty(0, dtype=int))
    number = 1 if train else 0  # of devices that are equally far, the first is named
    share = share_of_counts(source, train or [0], test or [0])
    with pytest.raises(
        RequestError, match=rf"device {number}, which comes closest, has {found} images for task 0 \(classes \[0, 1\]\)"
    ):
        fleet_of(source, nothing, share)


@pytest.mark.parametrize(
    ("train", "test", "sections", "advice"),
    [
        ([1], [1, 1], {}, "use fewer devices"),
        ([2, 2], [0], {}, "use fewer devices, fleet.test_data=matched or fleet.test_data=whole"),
        ([2, 2], [0], {"fleet": {"partition": "dirichlet", "test_data": "whole"}},
         r"use fewer devices, a larger fleet.alpha or another seed \(seed: 1 works\)"),
        ([1], [1, 1], {"fleet": {"partition": "dirichlet", "devices": 3}, "stream": {"min_samples": 200}},
         "use fewer devices, a larger fleet.alpha or a lower stream.min_samples"),
        ([2, 2], [1, 1], {"stream": {"tasks": 1, "held_out": 0.9}}, "lower stream.held_out"),
        ([2, 2], [1, 1], {"stream": {"tasks": 1, "min_samples": 9}},
         "use fewer devices or a lower stream.min_samples"),
        ([2, 2], [1, 1], {"stream": {"tasks": 1, "evaluate_on": "held-out"}}, "raise stream.held_out"),
    ],
)  # fmt: skip
def test_advice_for_a_fleet_without_samples_fits_the_cause(source, train, test, sections, advice):
    with pytest.raises(RequestError, match=rf": {advice}$"):
        fleet_of(source, share_of_counts(source, train, test), **sections)


@pytest.mark.parametrize(
    ("train", "test", "advice"),
    [
        ([2, 3], [0, 1, 2, 3], r"no training images of them; choose others by stream.class_order \(it has 2, 3\)"),
        ([0, 1, 2, 3], [2, 3], "no test images of them; raise data.test_fraction"),
    ],
)
def test_classes_that_the_source_has_no_images_of(train, test, advice):
    images = Source(toys.image_set(train * 5, 4), toys.image_set(test, 4))
    with pytest.raises(RequestError, match=rf"classes \[0, 1\]\); .* data.source has {advice}"):
        fleet_of(images, toys.whole(images), stream={"tasks": 1})


def test_crop_that_may_miss_the_image_is_refused(source):
    assert len(stream_of(source, data={"crop_padding": 7})) == 3
    for refuse in (stream_of, lambda source, **sections: fleet_of(source, toys.whole(source), **sections)):
        with pytest.raises(RequestError, match=r"data.crop_padding is 8, but the images have 8 pixels per side"):
            refuse(source, data={"crop_padding": 8})
    assert len(stream_of(source, data={"crop_padding": 8, "augmentation": "none"})) == 3


# -- samples and batches -------------------------------------------------------------------------------------------


def test_samples_are_the_sources_images(source):
    task = stream_of(source)[1]
    batch = task.train.load(np.array([3, 0]))
    for image, label, index in zip(batch.images, batch.labels, task.train.indices[[3, 0]], strict=True):
        assert np.array_equal(image.permute(1, 2, 0).numpy(), source.train.images[index])
        assert label == source.train.labels[index]
    assert batch.images.dtype == torch.uint8
    assert batch.images.shape == (2, 3, 8, 8)


def test_batches_cover_the_samples_in_order(source):
    samples = stream_of(source)[0].test
    batches = list(samples.batches(8))
    assert [len(batch.labels) for batch in batches] == [8, 8, 4]
    assert torch.equal(torch.cat([batch.labels for batch in batches]), samples.load().labels)


def epoch(task, size: int = 8, seed: int = 1, augmentation: str = "none"):
    return list(training_batches(task.train, size, seed, augmentation=augmentation, padding=2, device=toys.CPU))


def as_bytes(batches) -> list[bytes]:
    return [image.contiguous().numpy().tobytes() for batch in batches for image in batch.images]


def test_an_epoch_sees_every_training_sample_once(source):
    task = stream_of(source)[0]
    batches = epoch(task)
    assert [len(batch.labels) for batch in batches] == [8] * 9
    assert sorted(as_bytes(batches)) == sorted(as_bytes([task.train.load()]))


@pytest.mark.parametrize(("size", "sizes"), [(71, [71]), (35, [35, 35, 2]), (100, [72]), (24, [24, 24, 24])])
def test_a_single_left_over_sample_is_dropped(source, size, sizes):
    """Batch-norm has no variance over one value per channel."""
    assert [len(batch.labels) for batch in epoch(stream_of(source)[0], size)] == sizes


@pytest.mark.parametrize("augmentation", ["none", "crop", "crop-flip"])
def test_batches_are_a_function_of_their_seed(source, augmentation):
    task = stream_of(source)[0]
    first = as_bytes(epoch(task, augmentation=augmentation))
    assert as_bytes(epoch(task, augmentation=augmentation)) == first
    assert as_bytes(epoch(task, augmentation=augmentation, seed=2)) != first


def test_labels_stay_with_their_images_under_augmentation(source):
    task = stream_of(source)[0]
    plain, augmented = epoch(task), epoch(task, augmentation="crop-flip")
    for before, after in zip(plain, augmented, strict=True):
        assert torch.equal(before.labels, after.labels)
        assert before.images.shape == after.images.shape
        assert not torch.equal(before.images, after.images)


def test_crop_alone_never_mirrors(source):
    task = stream_of(source)[0]
    padded = {image.tobytes() for image in np.asarray(task.train.load().images.permute(0, 2, 3, 1)).copy()}
    batches = training_batches(task.train, 8, 1, augmentation="crop", padding=0, device=toys.CPU)
    assert {image.permute(1, 2, 0).contiguous().numpy().tobytes() for b in batches for image in b.images} == padded


# -- what a method sees --------------------------------------------------------------------------------------------


def test_samples_for_a_method_are_drawn_without_replacement(source):
    context = toys.context(1, [2, 3])
    drawn = as_bytes([context.sample(10, "memory")])
    assert len(set(drawn)) == 10
    assert set(drawn) <= set(as_bytes([context.task.train.load()]))
    assert as_bytes([context.sample(10, "memory")]) == drawn
    assert as_bytes([context.sample(10, "importance")]) != drawn
    assert as_bytes([toys.context(1, [2, 3], seed=6).sample(10, "memory")]) != drawn
    assert len(context.sample(10_000, "memory").labels) == len(context.task.train)


def test_only_the_first_task_is_first():
    assert toys.context(0, [0, 1]).is_first
    assert not toys.context(1, [0, 1]).is_first
    assert replace(toys.context(1, [0, 1]), first_id=1).is_first  # the device skips task 0


def test_labels_become_positions_among_the_classes():
    positions = TaskContext.position_of(torch.tensor([7, 2, 9, 2]), torch.tensor([2, 7, 9]))
    assert positions.tolist() == [1, 0, 2, 0]


def test_slices_of_a_stream_are_tasks(source):
    stream = stream_of(source)
    assert len(stream) == 3
    assert [task.id for task in stream[:2]] == [0, 1]
    assert stream[-1].id == 2
