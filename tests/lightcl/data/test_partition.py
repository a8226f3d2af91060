"""Which device holds which samples: by hand, and against flwr-datasets."""

import sys
from dataclasses import replace

import numpy as np
import pytest
from datasets import Dataset
from flwr_datasets import partitioner as reference
from pydantic import ValidationError

from lightcl import plugins
from lightcl.data import partition as partition_module
from lightcl.data import partitioners
from lightcl.data.images import ImageSet, Source
from lightcl.data.partition import label_counts, matched_counts, partition, share_of
from lightcl.data.partitioners import Pool, even_sizes, find_partitioner, register_partitioner
from lightcl.errors import RequestError
from lightcl.scenario import Fleet
from tests.lightcl import toys

KINDS = {
    "iid": {"partition": "iid"},
    "dirichlet": {"partition": "dirichlet", "alpha": 0.5},
    "pathological": {"partition": "pathological", "classes_per_device": 2},
}


def labeled(train: list[int], test: list[int], classes: int) -> Source:
    """A source of blank images: only the labels count here."""

    def images(labels: list[int]) -> ImageSet:
        return ImageSet(np.zeros((len(labels), 1, 1, 1), np.uint8), np.asarray(labels), tuple(map(str, range(classes))))

    return Source(images(train), images(test))


@pytest.fixture
def source() -> Source:
    return labeled(list(range(5)) * 40, list(range(5)) * 8, 5)


def shares_of(source: Source, kind: str, seed: int = 0, **fleet):
    return partition(source, Fleet(**{"devices": 5} | KINDS[kind] | fleet), seed)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("devices", [1, 2, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_no_sample_belongs_to_two_devices(source, kind, devices):
    shares = shares_of(source, kind, devices=devices)
    assert len(shares) == devices
    for split in ("train", "test"):
        held = np.concatenate([getattr(share, split) for share in shares])
        assert len(np.unique(held)) == len(held)
        assert held.min() >= 0
        assert held.max() < len(getattr(source, split))
    for share in shares:
        assert (np.diff(share.train) > 0).all()
        assert (np.diff(share.test) > 0).all()


@pytest.mark.parametrize("kind", ["iid", "dirichlet"])
def test_no_sample_is_left_over(source, kind):
    shares = shares_of(source, kind)
    assert sum(len(share.train) for share in shares) == len(source.train)
    held = {label for share in shares for label in source.train.labels[share.train].tolist()}
    assert held == set(range(5))
    assert sum(len(share.test) for share in shares) == len(source.test)


def test_iid_devices_hold_equal_amounts_drawn_at_random(source):
    shares = shares_of(source, "iid")
    assert [len(share.train) for share in shares] == [40] * 5
    assert all(len(np.unique(source.train.labels[share.train])) == 5 for share in shares)
    assert len({tuple(source.train.labels[share.train]) for share in shares}) == 5


def test_smaller_alpha_makes_devices_differ_more(source):
    def largest_class_share(alpha: float) -> float:
        shares = shares_of(source, "dirichlet", alpha=alpha)
        counts = [np.bincount(source.train.labels[share.train], minlength=5) for share in shares]
        return float(np.mean([count.max() / count.sum() for count in counts]))

    assert largest_class_share(0.3) > 0.4 > 0.3 > largest_class_share(1000.0)


@pytest.mark.filterwarnings("ignore:Classes. .* will NOT be used")
@pytest.mark.parametrize("devices", [1, 2, 5])
@pytest.mark.parametrize("wanted", [1, 2, 4])
def test_pathological_devices_hold_the_given_number_of_classes(source, wanted, devices):
    for share in shares_of(source, "pathological", classes_per_device=wanted, devices=devices):
        assert len(np.unique(source.train.labels[share.train])) == wanted


@pytest.mark.parametrize("kind", KINDS)
def test_devices_are_tested_on_their_classes_only(source, kind):
    for share in shares_of(source, kind):
        held = set(source.train.labels[share.train])
        assert set(source.test.labels[share.test]) <= held


def test_test_data_whole_is_all_images_of_the_devices_classes(source):
    for share in shares_of(source, "pathological", test_data="whole"):
        held = np.unique(source.train.labels[share.train])
        assert np.array_equal(share.test, np.flatnonzero(np.isin(source.test.labels, held)))


@pytest.mark.parametrize("kind", KINDS)
def test_partition_is_a_function_of_labels_fleet_and_seed(source, kind, monkeypatch, tmp_path):
    first = shares_of(source, kind, seed=4)
    monkeypatch.setenv("LIGHTCL_CACHE", str(tmp_path))  # computed anew
    np.random.default_rng().random()
    again, other = shares_of(source, kind, seed=4), shares_of(source, kind, seed=5)
    for mine, same in zip(first, again, strict=True):
        assert np.array_equal(mine.train, same.train)
        assert np.array_equal(mine.test, same.test)
    assert any(not np.array_equal(mine.train, theirs.train) for mine, theirs in zip(first, other, strict=True))


def test_partition_is_computed_once_and_read_back(source, monkeypatch, tmp_path):
    monkeypatch.setenv("LIGHTCL_CACHE", str(tmp_path))
    first = shares_of(source, "iid")

    def computed(*_: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(partition_module, "_train_owners", computed)
    for mine, stored in zip(first, shares_of(source, "iid"), strict=True):
        assert np.array_equal(mine.train, stored.train)
        assert np.array_equal(mine.test, stored.test)
    for changed in (
        lambda: shares_of(source, "iid", seed=1),
        lambda: shares_of(source, "iid", devices=4),
        lambda: shares_of(labeled([0, 1] * 30, [0, 1], 2), "iid"),
    ):
        with pytest.raises(AssertionError, match="computed again"):
            changed()


def test_one_share_reads_only_its_part_of_memory_mapped_files(source):
    shares = shares_of(source, "dirichlet")
    assert isinstance(shares._train.indices, np.memmap)
    fleet = Fleet(devices=5, **KINDS["dirichlet"])
    for device in (0, 4, -1):
        one = share_of(source, fleet, 0, device)
        assert np.array_equal(one.train, shares[device].train)
        assert np.array_equal(one.test, shares[device].test)
    assert [len(share.train) for share in shares[1:3]] == shares.sizes[1:3].tolist()
    with pytest.raises(IndexError):
        shares[5]


@pytest.mark.parametrize("name", ["train-indices.npy", "train-offsets.npy", "test-indices.npy"])
@pytest.mark.parametrize("damage", ["missing", "empty", "half"])
def test_a_damaged_entry_is_rebuilt(source, monkeypatch, tmp_path, name, damage):
    monkeypatch.setenv("LIGHTCL_CACHE", str(tmp_path))
    expected = [(share.train.tolist(), share.test.tolist()) for share in shares_of(source, "dirichlet")]
    (entry,) = (tmp_path / "partitions").iterdir()
    content = (entry / name).read_bytes()
    (entry / name).unlink()
    if damage != "missing":
        (entry / name).write_bytes(content[: len(content) // 2] if damage == "half" else b"")
    assert [(share.train.tolist(), share.test.tolist()) for share in shares_of(source, "dirichlet")] == expected
    assert ((entry / name).read_bytes(), list((tmp_path / "partitions").iterdir())) == (content, [entry])


# -- against flwr-datasets -----------------------------------------------------------------------------------------

LABELS = np.random.default_rng(8).integers(0, 6, 700)


def pool(kind: str, devices: int, seed: int = 3, groups: np.ndarray | None = None, **fleet) -> Pool:
    if kind == "natural":
        fleet["partition_by"] = "user"
    return Pool(LABELS, groups, Fleet(devices=devices, partition=kind, **fleet), seed)


def from_flower(partitioner: reference.Partitioner, columns: dict[str, np.ndarray] | None = None) -> np.ndarray:
    """The device of every image, from flwr-datasets' partitioner."""
    images = np.arange(len(LABELS))
    partitioner.dataset = Dataset.from_dict({"label": LABELS, "index": images} | (columns or {}))
    owners = np.full(len(LABELS), -1)
    for device in range(partitioner.num_partitions):
        owners[partitioner.load_partition(device)["index"]] = device
    return owners


@pytest.mark.filterwarnings("ignore:The specified min_partition_size", "ignore:Classes. .* will NOT be used")
@pytest.mark.parametrize("devices", [1, 6, 18, 60])
def test_images_are_divided_as_by_flower(devices):
    by_label = {"num_partitions": devices, "partition_by": "label", "seed": 3}
    pairs = [
        (pool("iid", devices), reference.IidPartitioner(devices)),
        (
            pool("dirichlet", devices, alpha=2.0),
            reference.DirichletPartitioner(alpha=2.0, min_partition_size=1, **by_label),
        ),
        (
            pool("pathological", devices, classes_per_device=2),
            reference.PathologicalPartitioner(
                num_classes_per_partition=2, class_assignment_mode="deterministic", **by_label
            ),
        ),
        (
            pool("inner-dirichlet", devices, alpha=0.7),
            reference.InnerDirichletPartitioner(
                even_sizes(len(LABELS), devices), partition_by="label", alpha=0.7, seed=3
            ),
        ),
    ]
    if devices <= 18:  # beyond, Flower refuses: a device would get nothing
        pairs.append((pool("linear", devices), reference.LinearPartitioner(devices)))
    if devices <= 6:
        pairs.append((pool("square", devices), reference.SquarePartitioner(devices)))
    if devices <= 6:
        pairs.append((pool("exponential", devices), reference.ExponentialPartitioner(devices)))
    for ours, theirs in pairs:
        owners = find_partitioner(ours.fleet.partition)(ours)
        assert np.array_equal(owners, from_flower(theirs)), ours.fleet.partition


@pytest.mark.parametrize("devices", [6, 18])
def test_log_normal_weights_divide_classes_as_by_flower(devices):
    ours = pool("distribution", devices, classes_per_device=2, sigma=1.0)
    weights = np.random.default_rng([3, 1]).lognormal(0.0, 1.0, 2 * devices).reshape(6, -1)
    theirs = reference.DistributionPartitioner(
        distribution_array=weights, num_partitions=devices, num_unique_labels_per_partition=2, partition_by="label",
        preassigned_num_samples_per_label=0, seed=3,
    )  # fmt: skip
    assert np.array_equal(find_partitioner("distribution")(ours), from_flower(theirs))


def test_natural_groups_are_devices_as_by_flower():
    users = np.random.default_rng(1).integers(0, 9, len(LABELS))
    theirs = reference.NaturalIdPartitioner(partition_by="user")
    assert np.array_equal(
        find_partitioner("natural")(pool("natural", 9, groups=users)), from_flower(theirs, {"user": users})
    )


def test_fewer_devices_than_groups_and_more():
    groups = np.array([5, 2, 2, 9, 7, 5])
    assert find_partitioner("natural")(pool("natural", 2, groups=groups)).tolist() == [
        0,
        0,
        0,
        1,
        1,
        0,
    ]  # {2, 5}, {7, 9}
    assert find_partitioner("natural")(pool("natural", 6, groups=groups)).tolist() == [1, 0, 0, 3, 2, 1]


# -- any number of devices -----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("devices", [1, 5, 199, 200, 500, 3000])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("iid", {}), ("dirichlet", {"alpha": 0.1}), ("dirichlet", {"alpha": 1e-4}), ("inner-dirichlet", {"alpha": 0.1}),
        ("inner-dirichlet", {"alpha": 1e-4}), ("pathological", {"classes_per_device": 2}),
        ("distribution", {"classes_per_device": 3}), ("linear", {}), ("square", {}), ("exponential", {}),
    ],
)  # fmt: skip
def test_any_number_of_devices_divides_the_images(source, kind, options, devices):
    shares = partition(source, Fleet(devices=devices, partition=kind, **options), 0)
    assert len(shares) == devices
    dealt = np.concatenate([share.train for share in shares])
    assert len(np.unique(dealt)) == len(dealt)
    if devices >= 5:  # one device holds only so many classes of a pathological partition
        assert len(dealt) == len(source.train)
    else:
        assert len(dealt) in (200, 80, 120)


def test_pathological_remainders_do_not_always_miss_the_last_devices(source):
    sizes = partition(source, Fleet(devices=400, partition="pathological", classes_per_device=2), 0).sizes
    assert 0 < (sizes[200:] > 0).sum() < 200
    assert abs(int((sizes[:200] > 0).sum()) - int((sizes[200:] > 0).sum())) < 60


def test_more_classes_than_the_source_has_are_refused(source):
    for kind in ("pathological", "distribution"):
        with pytest.raises(
            RequestError, match=rf"fleet.partition '{kind}': fleet.classes_per_device is 6, .* 5 classes"
        ):
            partition(source, Fleet(devices=5, partition=kind, classes_per_device=6), 0)


def test_a_natural_partition_needs_groups(source):
    with pytest.raises(
        RequestError, match=r"'natural' needs images with a user, writer or camera: .* fleet.partition_by"
    ):
        partition(source, Fleet(devices=5, partition="natural", partition_by="user"), 0)


def test_unknown_partitions_are_refused_with_the_nearest_name():
    with pytest.raises(ValidationError, match=r"fleet.partition is 'dirichlett': unknown, did you mean 'dirichlet'\?"):
        Fleet(partition="dirichlett")
    with pytest.raises(ValidationError, match=r"natural needs the column"):
        Fleet(partition="natural")
    with pytest.raises(ValidationError, match=r"no other partition uses it"):
        Fleet(partition="iid", partition_by="user")


def test_a_plugin_adds_a_partitioner(source, monkeypatch):
    monkeypatch.setattr(partitioners.PARTITIONERS, "_objects", dict(partitioners.PARTITIONERS))
    register_partitioner("round-robin", lambda pool: np.arange(len(pool.labels)) % pool.devices)
    assert partition(source, Fleet(devices=7, partition="round-robin"), 0).sizes.tolist() == [29] * 4 + [28] * 3
    with pytest.raises(RequestError, match="partitioner 'iid' is built in"):
        register_partitioner("iid", lambda pool: pool.labels)
    with pytest.raises(RequestError, match="partitioner 'round-robin' is registered twice"):
        register_partitioner("round-robin", partitioners.linear)


@pytest.mark.parametrize(
    ("returned", "text"),
    [
        (lambda pool: np.full(len(pool.labels), 3), "devices 3 to 3"),
        (lambda pool: np.full(len(pool.labels), -2), "devices -2 to -2"),
        (lambda pool: np.zeros(len(pool.labels) - 1, int), r"int64 of shape \[199\]"),
        (lambda pool: 0, r"int64 of shape \[\]"),
        (lambda pool: np.zeros(len(pool.labels)), r"float64 of shape \[200\]"),
    ],
)
def test_what_a_partitioner_of_a_plugin_returns_is_checked_and_nothing_bad_is_cached(
    source, tmp_path, monkeypatch, returned, text
):
    monkeypatch.setenv("LIGHTCL_CACHE", str(tmp_path))
    monkeypatch.setattr(partitioners.PARTITIONERS, "_objects", dict(partitioners.PARTITIONERS))
    register_partitioner("own", returned)
    for _ in range(2):
        with pytest.raises(RequestError, match=f"fleet.partition 'own': the partitioner returned {text}, expected"):
            partition(source, Fleet(devices=3, partition="own"), 0)
    assert not list(tmp_path.glob("partitions/*"))


def test_a_changed_partitioner_of_a_plugin_divides_anew(source, tmp_path, monkeypatch):
    """The file is read again, as in another process."""
    monkeypatch.setenv(plugins.VARIABLE, "")
    monkeypatch.setattr(partitioners.PARTITIONERS, "_objects", dict(partitioners.PARTITIONERS))
    file, loaded = tmp_path / "own.py", set(sys.modules)
    for device in (0, 2):
        for name in set(sys.modules) - loaded:
            del sys.modules[name]
        file.write_text(
            "import lightcl\n\n"
            f"def own(pool):\n    return [{device}] * len(pool.labels)\n\n"
            "lightcl.register_partitioner('own', own)\n"
        )
        plugins.load_plugins([file])
        sizes = partition(source, Fleet(devices=3, partition="own"), 0).sizes.tolist()
        assert sizes == [200 * (device == other) for other in range(3)]


# -- test images ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["iid", "pathological"])
def test_a_small_test_set_is_shared_by_devices_from_the_entire_fleet(kind):
    """2 classes of 300 training images and 30 test images each; with `iid` 100 devices hold a class."""
    source = labeled(list(range(2)) * 300, list(range(2)) * 30, 2)
    fleet = {"devices": 100, "classes_per_device": 1} if kind == "pathological" else {"devices": 100}
    shares = shares_of(source, kind, **fleet)
    tested = np.array([len(share.test) for share in shares])
    assert tested.sum() == 60
    assert tested.max() <= (1 if kind == "pathological" else 2)
    assert all(part.sum() >= 6 for part in np.array_split(tested, 4))
    other = np.array([len(share.test) for share in shares_of(source, kind, seed=1, **fleet)])
    assert not np.array_equal(tested, other)


def test_a_class_with_as_many_test_images_as_devices_is_divided_as_before(source):
    """Numbers from before devices were drawn."""
    shares = shares_of(source, "iid", devices=8)
    assert shares[0].test.tolist() == [10, 19, 26, 27, 33]
    assert shares[5].test.tolist() == [2, 11, 15, 28, 34]


def test_matched_counts_by_hand():
    # 30 and 10 training images, 100 test images each: class 0 runs out first; class 1: 10 * 100 / 30 = 33.3
    assert matched_counts(np.array([30, 10, 0]), np.array([100, 100, 100])).tolist() == [100, 33, 0]
    # class 1 runs out first: 8 of 2; class 0: 6 * 8 / 2 = 24
    assert matched_counts(np.array([6, 2]), np.array([100, 8])).tolist() == [24, 8]
    # one image of a hundred: 100 * 50 // 100 = 50 and 1 * 50 // 100 = 0, but at least one
    assert matched_counts(np.array([100, 1]), np.array([50, 50])).tolist() == [50, 1]
    # a class without test images does not count; a device without images is not tested
    # 133 images are more than 66; the smallest class keeps one
    assert matched_counts(np.array([30, 10, 0]), np.array([100, 100, 100]), 66).tolist() == [49, 16, 0]
    assert matched_counts(np.array([100, 1]), np.array([50, 50]), 10).tolist() == [9, 1]
    assert matched_counts(np.array([100, 1]), np.array([50, 50]), 1000).tolist() == [50, 1]
    assert matched_counts(np.array([[5, 5], [0, 0]]), np.array([0, 7])).tolist() == [[0, 7], [0, 0]]


def test_matched_test_images_are_in_proportion_seeded_and_shared(source):
    shares = shares_of(source, "dirichlet", test_data="matched")
    used: list[int] = []
    for share in shares:
        train = np.bincount(source.train.labels[share.train], minlength=5)
        test = np.bincount(source.test.labels[share.test], minlength=5)
        assert test.tolist() == matched_counts(train, np.full(5, 8)).tolist()
        assert test.max() == 8  # as many as there are
        assert len(np.unique(share.test)) == len(share.test)
        used += share.test.tolist()
    assert len(used) > len(np.unique(used))
    again, other = (shares_of(source, "dirichlet", test_data="matched", seed=seed) for seed in (0, 1))
    assert all(np.array_equal(a.test, b.test) for a, b in zip(shares, again, strict=True))
    assert any(not np.array_equal(a.test, b.test) for a, b in zip(shares, other, strict=True))


@pytest.mark.parametrize("test_data", ["share", "whole", "matched"])
@pytest.mark.parametrize("devices", [3, 40, 300])
def test_label_counts_agree_with_the_shares(source, devices, test_data):
    shares = partition(source, Fleet(devices=devices, partition="dirichlet", alpha=0.3, test_data=test_data), 0)
    fast, slow = shares.label_counts(), label_counts(source, list(shares))
    for split in (0, 1):
        assert fast[split].tolist() == slow[split].tolist()


def test_natural_test_images_belong_to_their_users_device():
    train, test = labeled([0, 1] * 6, [0, 1, 0, 1, 0, 0], 2).train, labeled([0], [0, 1, 0, 1, 0, 0], 2).test
    names = ("ann", "bob", "eve")
    source = Source(
        replace(train, groups=np.repeat([0, 1], 6), group_names=names),
        replace(test, groups=np.array([0, 0, 1, 1, 1, 2]), group_names=names),
    )
    ann, bob = partition(source, Fleet(devices=2, partition="natural", partition_by="user"), 0)
    assert (ann.train.tolist(), bob.train.tolist()) == (list(range(6)), list(range(6, 12)))
    assert set(ann.test) - {5} == {0, 1}
    assert set(bob.test) - {5} == {2, 3, 4}
    assert (5 in ann.test) != (5 in bob.test)  # eve's image: nobody's training images are hers, so it is dealt out


def test_pathological_default_is_as_many_classes_as_the_stream_needs(source):
    scenario = toys.scenario(fleet={"devices": 5, "partition": "pathological"}, stream={"classes_per_task": 1})
    shares = partition(source, scenario.fleet, 0)
    assert {len(np.unique(source.train.labels[share.train])) for share in shares} == {2}
    scenario = toys.scenario(fleet={"devices": 5, "partition": "pathological"}, stream={"classes_per_task": 2})
    shares = partition(source, scenario.fleet, 0)
    assert {len(np.unique(source.train.labels[share.train])) for share in shares} == {4}
