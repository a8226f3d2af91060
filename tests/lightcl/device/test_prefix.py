"""Prefix outputs image by image, and the cache of them: the same numbers on, off, and in any batch."""

import errno
import json
import multiprocessing
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from lightcl import plugins
from lightcl.assembly import build_network
from lightcl.data.augment import View
from lightcl.data.batches import viewed
from lightcl.data.images import ImageSet
from lightcl.data.tasks import Batch, Samples
from lightcl.device import prefix
from lightcl.device.device import EdgeDevice
from lightcl.device.network import device_network
from lightcl.device.prefix import FixedPrefix, check_cache_limit, fixed_prefix, prefix_cache, warm
from lightcl.errors import RequestError
from lightcl.networks import BACKBONES
from lightcl.networks.native import NativeConv3x3, use_native_
from lightcl.networks.weights import digest
from lightcl.scenario import Scenario
from lightcl.storage.prefix_cache import SEGMENT_ROWS, CacheFull, FeatureStore, PrefixCache
from tests.lightcl import toys

VIEWS = {"augmentation": "crop-flip", "crop_padding": 1, "views": 2}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTCL_CACHE", str(tmp_path / "cache"))


def learned(folder, **sections) -> tuple[EdgeDevice, list[object]]:
    """The entire stream; returns the device and every number that it reports."""
    device = toys.device(folder, training={"epochs": 3, "batch_size": 8}, **sections)
    numbers: list[object] = []
    for task in range(len(device.stream)):
        numbers.append(device.train(task, 3).loss)
        tested = device.evaluate()
        numbers += [tested.til, tested.cil]
    return device, numbers


def trained_tensors(device: EdgeDevice) -> dict[str, torch.Tensor]:
    return toys.copy_of(device.network.state_dict() | device.method.state_dict())


CONVOLUTIONS = pytest.mark.parametrize("convolutions", ["direct", pytest.param("native", marks=toys.needs_compiler)])


@pytest.fixture
def few_channels(monkeypatch):
    """Convolutions of a toy network are computed in C as well."""
    monkeypatch.setattr(NativeConv3x3, "fewest_channels", {1: 1, 2: 1})


@CONVOLUTIONS
@pytest.mark.parametrize("method", ["lightcl", "lightcl-plus", "er", "pnn"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_cache_on_and_off_are_bit_identical(tmp_path, few_channels, method, precision, convolutions):
    sections = {"data": VIEWS, "method": {"name": method}, "network": {"freeze": "layer3"}}
    ends = []
    for cache, name in (("off", "a"), ("on", "b"), ("on", "c")):  # the third finds everything in the cache
        hardware = {"prefix_cache": cache, "precision": precision, "accelerator": "cpu", "convolutions": convolutions}
        device, numbers = learned(tmp_path / name, device=hardware, **sections)
        ends.append((numbers, trained_tensors(device)))
    for numbers, tensors in ends[1:]:
        assert numbers == ends[0][0]
        toys.assert_same(tensors, ends[0][1])


def test_auto_caches_only_with_views(tmp_path):
    learned(tmp_path / "a", data={"views": 0})
    assert prefix_cache().stores() == []
    learned(tmp_path / "b", data=VIEWS)
    assert len(prefix_cache().stores()) == 4  # test images, training images as they are and in two views
    assert not toys.scenario(data=VIEWS, method={"name": "sgd"}).caches_prefix
    assert not toys.scenario(data=VIEWS, network={"frozen_batch_norm": "train"}).caches_prefix


def test_training_images_without_augmentation_are_cached_where_the_cache_is_on(tmp_path):
    """`data.views: 0`: the epochs see the source's own images."""
    sections = {"data": {"augmentation": "none", "views": 0}, "method": {"name": "er"}, "network": {"freeze": "layer3"}}
    ends = []
    for name in ("a", "b"):
        device, numbers = learned(tmp_path / name, device={"prefix_cache": "on", "accelerator": "cpu"}, **sections)
        ends.append((numbers, trained_tensors(device)))
    assert sorted(store.rows for store in prefix_cache().stores()) == [20, 72]  # a tenth of 80 is held out
    assert ends[1][0] == ends[0][0]
    toys.assert_same(ends[1][1], ends[0][1])


def test_a_disk_that_fails_while_a_row_is_read_costs_only_time(tmp_path, monkeypatch):
    _, expected = learned(tmp_path / "a", data=VIEWS)
    reading = os.preadv

    def failing(handle, buffers, place):
        if place % 3 == 0:
            raise OSError(errno.EIO, "Input/output error")
        return reading(handle, buffers, place)

    with monkeypatch.context() as patched:
        patched.setattr("lightcl.storage.prefix_cache.os.preadv", failing)
        _, numbers = learned(tmp_path / "b", data=VIEWS)
    assert numbers == expected


def test_views_also_work_without_a_cacheable_prefix(tmp_path):
    for method in ("sgd", "ewc"):
        _, numbers = learned(tmp_path / method, data=VIEWS, method={"name": method})
        assert np.isfinite(numbers[0])


def test_cached_images_are_not_read_again(tmp_path):
    """With all outputs in the cache, training reads no image."""
    learned(tmp_path / "a", data=VIEWS, method={"name": "lightcl", "beta": 0.0})
    held = toys.source(size=16)
    read: list[int] = []

    class Counted(np.ndarray):
        def __getitem__(self, rows):
            if isinstance(rows, np.ndarray):
                read.append(len(rows))
            return np.ndarray.__getitem__(self, rows)

    images = held.train.images.view(Counted)
    source = type(held)(ImageSet(images, held.train.labels, held.train.classes), held.test)
    scenario = toys.scenario(
        data=VIEWS, method={"name": "lightcl", "beta": 0.0}, training={"epochs": 3, "batch_size": 8}
    )
    device = EdgeDevice(scenario, 0, tmp_path / "b", source=source, share=toys.whole(held))
    read.clear()  # cutting the stream reads labels alone
    device.train(0, 3)
    assert read == []


@toys.needs_compiler
def test_arithmetics_have_stores_of_their_own():
    keys = set()
    for convolutions in ("direct", "native"):
        scenario = toys.scenario(data=VIEWS, device={"convolutions": convolutions, "accelerator": "cpu"})
        network = device_network(scenario, in_channels=3, classes=4)
        keys.add(json.dumps(fixed_prefix(scenario, network, "digest").stores.about, sort_keys=True))
    assert len(keys) == 2


@CONVOLUTIONS
@pytest.mark.parametrize("threads", [1, 2])
def test_an_output_depends_on_the_image_alone(few_channels, threads, convolutions):
    network = toys.network(freeze="layer3", width=20).to(memory_format=torch.channels_last).eval()
    if convolutions == "native":
        use_native_(network.prefix)
    images = toys.images(40, size=32).contiguous(memory_format=torch.channels_last)
    labels = torch.zeros(40)
    features, before = FixedPrefix(network), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = features([Batch(images, labels)])
        for size in (1, 3, 16, 32):
            parts = [features([Batch(part, labels[: len(part)])]) for part in torch.split(images, size)]
            assert torch.equal(torch.cat(parts), together)
        order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
        assert torch.equal(features([Batch(images[order], labels)]), together[order])
        assert torch.allclose(together, network.features(images), rtol=1e-4, atol=1e-4)
    finally:
        torch.set_num_threads(before)


def _outputs_in_another_process(seed):
    network = toys.network(freeze="layer3", seed=seed).to(memory_format=torch.channels_last).eval()
    held = toys.source(size=16)
    scenario = toys.scenario(data=VIEWS)
    features = fixed_prefix(scenario, network, digest(network.prefix))
    samples = Samples(held.train, np.arange(3, 60))
    found = features([viewed(samples, View(0, 1, "crop-flip", 1))])
    return found.numpy(), [store.key for store in prefix_cache().stores()]


def test_processes_share_a_store():
    """The second process, a new interpreter, finds what this one wrote, under the same key."""
    first, keys = _outputs_in_another_process(1)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        second, again = pool.apply(_outputs_in_another_process, (1,))
        _, other = pool.apply(_outputs_in_another_process, (2,))
    assert np.array_equal(first, second)
    assert keys == again
    assert len(other) == 2  # other weights, another store


def test_a_changed_network_of_a_plugin_has_a_store_of_its_own(tmp_path, monkeypatch):
    """Same weights, another activation; the file is read again, as in another process."""
    monkeypatch.setenv(plugins.VARIABLE, "")
    monkeypatch.setattr(BACKBONES, "_objects", dict(BACKBONES))
    file, loaded = tmp_path / "net.py", set(sys.modules)
    text = (Path(__file__).parents[3] / "examples" / "a_new_network.py").read_text()
    network = {"name": "small-cnn", "width": 4, "freeze": "block1"}
    tested = Samples(toys.source(size=16).test, np.arange(8))
    for content in (text, text.replace("F.relu", "F.tanh"), text):
        for name in set(sys.modules) - loaded:
            del sys.modules[name]
        file.write_text(content)
        plugins.load_plugins([file])
        scenario = toys.scenario(data=VIEWS, network=network)
        built = build_network(scenario, in_channels=3, classes=4).eval()
        expected = FixedPrefix(built)([tested.load()])
        assert torch.equal(fixed_prefix(scenario, built, digest(built.prefix))([tested.load()]), expected)
    assert [len(store.about["code"]) for store in prefix_cache().stores()] == [1, 1]


@pytest.mark.parametrize(("dtype", "bound"), [("fp16", 2**-11), ("bf16", 2**-8)])
def test_rounded_outputs_are_within_their_bound_and_the_same_cached_or_not(tmp_path, dtype, bound):
    hardware = {"prefix_cache_dtype": dtype, "accelerator": "cpu"}
    _, first = learned(tmp_path / "a", data=VIEWS, device=hardware)
    _, second = learned(tmp_path / "b", data=VIEWS, device=hardware)
    assert first == second
    scenario, held = toys.scenario(data=VIEWS, device=hardware), toys.source(size=16)
    network = build_network(scenario, in_channels=3, classes=4).eval()
    batch = Samples(held.test, np.arange(20)).load()
    exact = FixedPrefix(network)([batch])
    features = fixed_prefix(scenario, network, digest(network.prefix))
    rounded, read = features([batch]), features([batch])
    assert torch.equal(rounded, read)
    assert not torch.equal(rounded, exact)
    assert ((rounded - exact).abs() <= bound * exact.abs() + 6e-8).all()


def test_a_full_disk_switches_the_cache_off_and_not_the_run(tmp_path, monkeypatch):
    _, expected = learned(tmp_path / "a", data=VIEWS, device={"prefix_cache": "off", "accelerator": "cpu"})

    def full(*_):
        raise CacheFull("no room")

    monkeypatch.setattr(FeatureStore, "write", full)
    with pytest.warns(RuntimeWarning, match="prefix cache is off from here on: no room"):
        _, numbers = learned(tmp_path / "b", data=VIEWS)
    assert numbers == expected
    monkeypatch.undo()
    monkeypatch.setenv("LIGHTCL_CACHE", "/proc/nowhere")
    with pytest.warns(RuntimeWarning, match="prefix cache is off"):
        _, numbers = learned(tmp_path / "c", data=VIEWS)
    assert numbers == expected


def test_a_segment_that_cannot_be_opened_switches_the_cache_off_and_not_the_run(tmp_path, monkeypatch):
    _, expected = learned(tmp_path / "a", data=VIEWS)
    before = [store.rows for store in prefix_cache().stores()]

    def failing(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("lightcl.storage.prefix_cache._Segment", failing)
    with pytest.warns(RuntimeWarning, match="prefix cache is off from here on: .*Too many open files") as told:
        _, numbers = learned(tmp_path / "b", data=VIEWS)
    assert numbers == expected
    assert len(told) == 1
    assert [store.rows for store in prefix_cache().stores()] == before


def test_a_damaged_store_is_computed_again(tmp_path):
    _, expected = learned(tmp_path / "a", data=VIEWS)
    for file in (tmp_path / "cache" / "prefix").glob("*/*.rows"):
        content = bytearray(file.read_bytes())
        content[5000:6000] = bytes(1000)
        file.write_bytes(content)
    _, numbers = learned(tmp_path / "b", data=VIEWS)
    assert numbers == expected


@CONVOLUTIONS
def test_a_warmed_cache_holds_everything(tmp_path, few_channels, convolutions):
    """And what the devices would compute themselves."""
    device = {"convolutions": convolutions, "accelerator": "cpu"}
    _, numbers = learned(tmp_path / "alone", data=VIEWS, device=device | {"prefix_cache": "off"})
    scenario, held = toys.scenario(data=VIEWS, device=device), toys.source(size=16)
    steps = list(warm(scenario, held))
    assert steps[-1].done == steps[-1].images == 20 + 3 * 80
    rows = sorted(store.rows for store in prefix_cache().stores())
    assert rows == [20, 80, 80, 80]
    assert learned(tmp_path / "a", data=VIEWS, device=device)[1] == numbers
    assert sorted(store.rows for store in prefix_cache().stores()) == rows


def test_a_limit_that_warm_accepts_holds_everything():
    """20 test images and three times 80 training images: four stores of one segment each, most of it empty."""
    held, row = toys.source(size=16), 16 * 4 * 4 * 4
    needed = 4 * SEGMENT_ROWS * (8 + row)

    def limited(size: int) -> Scenario:
        return toys.scenario(data=VIEWS, device={"prefix_cache_gb": size / prefix.GB})

    with pytest.raises(RequestError, match=r"260 outputs of 16x4x4 take 0\.00212"):
        list(warm(limited(needed - 1), held))
    list(warm(limited(needed), held))
    assert sorted(store.rows for store in prefix_cache().stores()) == [20, 80, 80, 80]
    assert sum(store.size for store in prefix_cache().stores()) == needed


def test_a_limit_below_one_segment_is_refused_before_a_run():
    network = toys.network(freeze="layer3").eval()
    segment = SEGMENT_ROWS * (8 + 16 * 4 * 4 * 4)

    def check(size: int, **device: object) -> None:
        values = {"prefix_cache_gb": size / prefix.GB, "accelerator": "cpu"} | device
        check_cache_limit(toys.scenario(data=VIEWS, device=values), network, (16, 16, 3))

    check(segment)
    with pytest.raises(RequestError, match=r"prefix_cache_gb is .* the cache grows by 512 outputs of 16x4x4"):
        check(segment - 1)
    check(segment - 1, prefix_cache_dtype="bf16")
    check(1, prefix_cache="off")


def test_a_scenario_without_a_cache_cannot_be_warmed():
    held = toys.source(size=16)
    with pytest.raises(RequestError, match="uses no prefix cache"):
        list(warm(toys.scenario(), held))
    with pytest.raises(RequestError, match=r"prefix_cache_gb is 1e-06, but 260 outputs of 16x4x4 take"):
        list(warm(toys.scenario(data=VIEWS, device={"prefix_cache_gb": 1e-6}), held))


@pytest.mark.parametrize(
    ("sections", "text"),
    [
        ({"network": {"frozen_batch_norm": "train"}}, "device.prefix_cache is on, but network.frozen_batch_norm"),
        ({"method": {"name": "sgd"}}, "device.prefix_cache is on, but method sgd freezes nothing"),
        ({"data": {"views": -1}}, "views"),
        ({"device": {"prefix_cache_gb": 0}}, "prefix_cache_gb"),
    ],
)
def test_an_invalid_cache_setting_is_refused(sections, text):
    with pytest.raises(ValidationError, match=text):
        toys.scenario(**{"device": {"prefix_cache": "on"}} | sections)


def test_the_prefix_cache_has_its_own_folder(tmp_path):
    assert isinstance(prefix_cache(), PrefixCache)
    assert prefix_cache().folder == tmp_path / "cache" / "prefix"


def chunks_of(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of images in every chunk that passes the prefix from here on, before it is padded."""
    found: list[int] = []
    compute = FixedPrefix._compute

    def counted(self: FixedPrefix, images: torch.Tensor) -> torch.Tensor:
        found.extend(len(part) for part in torch.split(images, prefix.CHUNK))
        return compute(self, images)

    monkeypatch.setattr(FixedPrefix, "_compute", counted)
    return found


def test_images_that_are_asked_for_later_take_the_room_in_a_chunk(tmp_path, monkeypatch):
    """18 images of a task in two views, four of them as they are, and ten test images: 50 outputs in four chunks, where
    every batch of four alone would be one."""
    found = chunks_of(monkeypatch)
    method = {"name": "lightcl", "beta": 0.0}
    held = toys.source(train=10, size=16)
    scenario = toys.scenario(data=VIEWS, method=method, training={"epochs": 2, "batch_size": 4})
    device = EdgeDevice(scenario, 0, tmp_path / "device", source=held, share=toys.whole(held))
    device.train(0, 2)
    assert len(device.stream.to_learn(0).train) == 18
    device.evaluate()
    assert found == [16, 16, 16, 2]


def test_an_announced_image_is_computed_once_and_as_if_alone(monkeypatch):
    network = toys.network(freeze="layer3").to(memory_format=torch.channels_last).eval()
    held = toys.source(size=16)
    scenario, weights = toys.scenario(data=VIEWS), digest(network.prefix)
    seen, view = Samples(held.train, np.arange(10)), View(0, 1, "crop-flip", 1)
    tested = Samples(held.test, np.arange(6))
    asked = [viewed(seen, view), seen.load(), tested.load()]
    expected = [FixedPrefix(network)([batch]) for batch in asked]
    features = fixed_prefix(scenario, network, weights)
    found = chunks_of(monkeypatch)
    features.announce([*asked, seen.load()])  # the last ones once more
    first = features([viewed(seen.only(slice(0, 4)), view)])
    assert found == [16]  # four, the other six of the view, and six of the images as they are
    rest = [features([batch]) for batch in asked]
    assert found == [16, 10]
    assert torch.equal(first, expected[0][:4])
    assert all(torch.equal(one, other) for one, other in zip(rest, expected, strict=True))


def test_the_prefix_stays_in_memory_while_the_next_announced_image_needs_it():
    network = toys.network(freeze="layer3").to(memory_format=torch.channels_last).eval()
    held = toys.source(size=16)
    features = fixed_prefix(toys.scenario(data=VIEWS), network, digest(network.prefix))
    seen, tested = Samples(held.train, np.arange(20)).load(), Samples(held.test, np.arange(20)).load()
    asked = [Samples(held.train, np.arange(start, start + 4)).load() for start in (0, 4)]
    kept = []
    features.announce([seen, tested])
    for batch in (*asked, *asked, seen, *asked):
        features([batch])
        kept.append(features._stage is not None)
    # Four and twelve announced; found, but four more of them are missing; the last of them; found.
    assert kept == [True, True, True, True, True, False, False]


def test_folding_leaves_the_files_of_a_partly_filled_cache_open():
    """The stores of a worker's prefix hold open files when the first missing output is computed, as after a kill."""
    network = toys.network(freeze="layer3").to(memory_format=torch.channels_last).eval()
    held, weights = toys.source(size=16), digest(network.prefix)
    first, second = (Samples(held.train, np.arange(start, start + 16)).load() for start in (0, 16))
    fixed_prefix(toys.scenario(data=VIEWS), network, weights)([first])
    network.prefix.derived = {}  # as in a worker, whose devices share the prefix
    features = fixed_prefix(toys.scenario(data=VIEWS), network, weights)
    expected = features([first])
    features([second])
    assert network.prefix.derive("stores", lambda: None) is features.stores
    assert torch.equal(features([first]), expected)
