"""In a simulation a device stays open between its training and its test; nobody may see that in the numbers."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import client.app
from client.kept import KeptDevices, Opened
from lightcl.device.device import EdgeDevice, OutOfStep
from lightcl.exchange.messages import Tested
from lightcl.networks.lending import NetworkLender
from lightcl.scenario import Scenario, method_names
from simulations.runtime.devices import make_local_app
from tests.inprocess import rows_of_a_run, small

ISOLATED = ("pnn", "sparcl-er", "sparcl-derpp")


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of the devices that were opened from their saved states."""
    numbers: list[int] = []
    restore = EdgeDevice._restore

    def restored(device: EdgeDevice) -> bool:
        numbers.append(device.number)
        return restore(device)

    monkeypatch.setattr(EdgeDevice, "_restore", restored)
    return numbers


def rows(folder: Path, scenario: Scenario, kept: KeptDevices) -> list[dict[str, Any]]:
    """The rows of a run whose only worker has these kept devices."""
    client.app._lender.cache_clear()  # as in a new process
    client.app._kept.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client.app, "KeptDevices", lambda: kept)
        return rows_of_a_run(folder, scenario, make_local_app)


@pytest.mark.parametrize("method", sorted(set(method_names()) - set(ISOLATED)))
def test_the_numbers_are_those_of_devices_that_are_opened_for_every_message(
    tmp_path: Path, opened: list[int], method: str
) -> None:
    scenario = small(
        method={"name": method}, fleet={"devices": 2}, training={"epochs": 1}, server={"aggregation": "suffix"}
    )
    found = rows(tmp_path / "kept", scenario, KeptDevices())
    once = len(opened)
    assert found == rows(tmp_path / "opened", scenario, KeptDevices(0))
    assert len(opened) - once == 2 * once, "a training and a test each"


def test_only_those_are_kept_that_fit(tmp_path: Path, opened: list[int]) -> None:
    scenario = small(training={"epochs": 1}, stream={"tasks": 1}, server={"aggregation": "suffix"})
    kept = KeptDevices()
    rows(tmp_path / "three", scenario, kept)
    assert sorted(opened) == [0, 1, 2]
    assert kept._kept == {}, "all are tested"
    assert kept._bytes == 0
    size = EdgeDevice(scenario, 0, next((tmp_path / "three" / "s").glob("*/device-00000"))).bytes_in_memory
    opened.clear()
    rows(tmp_path / "two", scenario, KeptDevices(5 * size // 2))
    assert len(opened) == 4, "room for two of three"


def test_where_nothing_is_shared_none_waits_for_its_test(tmp_path: Path, opened: list[int]) -> None:
    scenario = small(fleet={"devices": 2}, training={"epochs": 1}, server={"aggregation": "none"})
    kept = KeptDevices()
    rows(tmp_path, scenario, kept)
    assert kept._kept == {}
    assert len(opened) == 2 * scenario.stream.tasks


class Shelf:
    """Kept devices that are opened here by name; `closed` are the names of those that were closed."""

    def __init__(self, folder: Path, most_bytes: int = 1 << 30) -> None:
        self.folder, self.kept = folder, KeptDevices(most_bytes)
        self.opened: list[int] = []
        self.closed: list[int] = []
        self.scenario = small(training={"epochs": 1})

    @contextmanager
    def _open(self, number: int) -> Iterator[Opened]:
        self.opened.append(number)
        about: Any = None
        device = EdgeDevice(self.scenario, number, self.folder / str(number), durable=False)
        try:
            yield Opened(device, about)
        finally:
            device.close()
            self.closed.append(number)

    @contextmanager
    def device(self, number: int, at: int = 1) -> Iterator[Opened]:
        with self.kept.opened(at, number, lambda: self._open(number)) as opened:
            yield opened

    def train(self, number: int, task: int = 0) -> None:
        with self.device(number) as opened:
            opened.stays = True
            opened.device.train(task, 1)


def test_a_device_that_awaits_its_test_is_the_same_object_then(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    with shelf.device(0) as opened:
        trained = opened.device
        assert not trained.awaits_test
        trained.train(0, 1)
        opened.stays = trained.awaits_test
    assert shelf.closed == []
    with shelf.device(0) as opened:
        assert opened.device is trained
        trained.evaluate()
        opened.stays = trained.awaits_test
    assert shelf.closed == [0]
    assert shelf.opened == [0]


def test_one_that_another_process_has_saved_since_is_opened_again(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    shelf.train(0)
    EdgeDevice(shelf.scenario, 0, tmp_path / "0", durable=False).evaluate()
    with shelf.device(0) as opened:
        assert shelf.closed == [0]
        assert 0 in opened.device.rows["til"]
    assert shelf.opened == [0, 0]


def test_one_whose_state_is_gone_begins_its_stream_again(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    shelf.train(0)
    for file in (tmp_path / "0").iterdir():
        file.unlink()
    with shelf.device(0) as opened:
        assert opened.device.position.epochs == 0


def test_the_next_round_closes_what_was_not_tested_in_the_last(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    shelf.train(0)
    shelf.train(1)
    with shelf.device(2, at=2):
        assert sorted(shelf.closed) == [0, 1]
    assert shelf.kept._bytes == 0


def test_an_error_at_work_closes_the_device(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    shelf.train(0)
    with pytest.raises(OutOfStep):
        shelf.train(0, task=2)
    assert shelf.closed == [0]
    with shelf.device(0):
        assert shelf.opened == [0, 0]


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_device_counts_what_it_does_not_share_with_others(tmp_path: Path, mode: str) -> None:
    scenario = small(network={"frozen_batch_norm": mode, "freeze": "layer4"}, server={"aggregation": "suffix+head"})
    network = client.app.device_network(scenario, in_channels=1, classes=10)
    device = EdgeDevice(scenario, 0, tmp_path, network=network)
    unshared = NetworkLender(network, again=True)._start
    assert device.bytes_in_memory == pytest.approx(sum(tensor.nbytes for tensor in unshared), rel=0.001)


def test_a_closed_device_is_freed_at_once(tmp_path: Path) -> None:
    """Also where its prefix's outputs were announced and the cache had all of them: that refers to the device."""
    scenario = small(data={"views": 2}, training={"epochs": 1}, device={"prefix_cache": "on"})
    for at in ("cold", "warm"):
        shelf = Shelf(tmp_path / at)
        shelf.scenario = scenario
        shelf.train(0)
        ((kept, *_),) = shelf.kept._kept.values()
        device = weakref.ref(kept.device)
        del kept
        gc.disable()
        try:
            shelf.kept.close()
            assert device() is None
        finally:
            gc.enable()


def test_a_start_that_is_damaged_between_training_and_test_costs_only_disk(tmp_path: Path) -> None:
    scenario = small(training={"epochs": 1}, server={"aggregation": "suffix"})
    expected = rows(tmp_path / "good", scenario, KeptDevices())
    damaged: list[Path] = []
    test = EdgeDevice.evaluate

    def evaluate(device: EdgeDevice) -> Tested:
        if not damaged:
            (file,) = (tmp_path / "bad" / "s").glob("*/shared/start-*.safetensors")
            content = bytearray(file.read_bytes())
            content[-1] ^= 1
            file.write_bytes(content)
            damaged.append(file)
        return test(device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EdgeDevice, "evaluate", evaluate)
        assert rows(tmp_path / "bad", scenario, KeptDevices()) == expected
    assert damaged
