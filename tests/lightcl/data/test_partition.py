"""Who gets which samples."""

import numpy as np
import pytest

from lightcl.data import partition as partition_module
from lightcl.data.partition import partition
from lightcl.data.sources import ImageSet, Source
from lightcl.errors import RequestError
from lightcl.scenario import Fleet
from tests.lightcl import toys

KINDS = {
    "iid": {"partition": "iid"},
    "dirichlet": {"partition": "dirichlet", "alpha": 0.5},
    "pathological": {"partition": "pathological", "classes_per_device": 2},
}


def labelled(train: list[int], test: list[int], classes: int) -> Source:
    """A source of blank images: only the labels count here."""

    def images(labels: list[int]) -> ImageSet:
        return ImageSet(np.zeros((len(labels), 1, 1, 1), np.uint8), np.asarray(labels), tuple(map(str, range(classes))))

    return Source(images(train), images(test))


@pytest.fixture
def source() -> Source:
    return labelled(list(range(5)) * 40, list(range(5)) * 8, 5)


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
def test_pathological_devices_hold_so_many_classes(source, wanted, devices):
    for share in shares_of(source, "pathological", classes_per_device=wanted, devices=devices):
        assert len(np.unique(source.train.labels[share.train])) == wanted


@pytest.mark.parametrize("kind", KINDS)
def test_devices_are_tested_on_their_classes_only(source, kind):
    for share in shares_of(source, kind):
        held = set(source.train.labels[share.train])
        assert set(source.test.labels[share.test]) <= held


def test_whole_test_data_is_all_images_of_the_devices_classes(source):
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

    monkeypatch.setattr(partition_module, "_split_train", computed)
    for mine, stored in zip(first, shares_of(source, "iid"), strict=True):
        assert np.array_equal(mine.train, stored.train)
        assert np.array_equal(mine.test, stored.test)
    for changed in (
        lambda: shares_of(source, "iid", seed=1),
        lambda: shares_of(source, "iid", devices=4),
        lambda: shares_of(labelled([0, 1] * 30, [0, 1], 2), "iid"),
    ):
        with pytest.raises(AssertionError, match="computed again"):
            changed()


def test_more_devices_than_images_are_refused(source):
    with pytest.raises(RequestError, match=r"fleet.devices: 201 devices cannot share 200 training images"):
        shares_of(source, "iid", devices=201)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("kind", "fleet"), [("pathological", {"classes_per_device": 6}), ("dirichlet", {"alpha": 1e-4, "devices": 20})]
)
def test_partition_that_cannot_be_made_is_refused(source, kind, fleet):
    with pytest.raises(RequestError, match=rf"fleet.partition '{kind}'"):
        shares_of(source, kind, **fleet)


def test_pathological_default_is_as_many_classes_as_the_stream_needs(source):
    scenario = toys.scenario(fleet={"devices": 5, "partition": "pathological"}, stream={"classes_per_task": 1})
    shares = partition(source, scenario.fleet, 0)
    assert {len(np.unique(source.train.labels[share.train])) for share in shares} == {2}
    scenario = toys.scenario(fleet={"devices": 5, "partition": "pathological"}, stream={"classes_per_task": 2})
    shares = partition(source, scenario.fleet, 0)
    assert {len(np.unique(source.train.labels[share.train])) for share in shares} == {4}
