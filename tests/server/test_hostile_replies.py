"""Replies that no device of this project would send: each is a failure of its device alone, and the run ends well."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message

from lightcl.assembly import build_network
from lightcl.records import load_run
from lightcl.records.folder import RunFolder
from lightcl.scenario import Scenario
from server.aggregation.statistics import ClassSums
from server.rounds import Coordinator
from tests.inprocess import InProcessGrid, Silent, small

Spoil = Callable[[Message], None]


def run_with(tmp_path: Path, scenario: Scenario, spoil: Spoil, devices: tuple[int, ...] = (1,)) -> Silent:
    """Spoils the first trainings of some devices; asserts that all finish all the same and the folder can be read."""

    def tamper(message: Message, reply: Message) -> Message:
        instruction = message.content["instruction"]
        if message.metadata.message_type == "train" and instruction["round"] == 1 and instruction["device"] in devices:
            spoil(reply)
        return reply

    folder, listener = RunFolder(tmp_path / "run"), Silent()
    folder.begin(scenario, {"run": "r"}, [])
    results = Coordinator(scenario, folder, "r", listener).run(InProcessGrid(tmp_path / "s", 3, tamper))
    assert results.devices_finished == 3
    assert [row.device for row in load_run(folder.path).devices if row.error] == list(devices)
    return listener


def _set(record: str, field: str, value: Any) -> Spoil:
    def spoil(reply: Message) -> None:
        reply.content[record] = ConfigRecord(dict(reply.content[record]) | {field: value})

    return spoil


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_set("reply", "seconds", float("nan")), "seconds is nan"),
        (_set("reply", "seconds", -1.0), "seconds is -1.0"),
        (_set("reply", "peak_memory_mib", float("inf")), "peak_memory_mib is inf"),
        (_set("reply", "loss", 1e308), "with a loss of 1e+308"),
        (_set("tested", "seconds", float("inf")), "seconds is inf"),
        (_set("tested", "images", [-1]), "a test of -1 images"),
        (_set("tested", "til", [True]), "Tested.til is [True], expected list[float]"),
        (_set("tested", "tasks", [False]), "Tested.tasks is [False], expected list[int]"),
    ],
)
def test_numbers_that_no_row_can_hold(tmp_path: Path, spoil: Spoil, said: str) -> None:
    refusals = run_with(tmp_path, small(stream={"tasks": 1}), spoil).refusals
    assert [device for device, _ in refusals] == [1]
    assert said in refusals[0][1]


def test_losses_whose_sum_overflows(tmp_path: Path) -> None:
    refusals = run_with(tmp_path, small(stream={"tasks": 1}), _set("reply", "loss", 1.7e308), (0, 1, 2)).refusals
    assert [device for device, _ in refusals] == [0, 1, 2]


def _archive() -> bytes:
    file = io.BytesIO()
    np.savez(file, a=np.ones(1))
    return file.getvalue()


def _header(text: str) -> bytes:
    """A .npy file of version 1.0 with this header and no data."""
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(_archive(), id="an archive of arrays"),
        pytest.param(b"PK\x03\x04 and no archive", id="a broken archive"),
        pytest.param(
            _header("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000000,)}\n"), id="4 PB of numbers"
        ),
        pytest.param(_header("(" * 5000 + "\n"), id="a header that is nested too deeply"),
        pytest.param(b"", id="nothing"),
    ],
)
def test_bytes_that_are_no_array(tmp_path: Path, data: bytes) -> None:
    def spoil(reply: Message) -> None:
        arrays = dict(reply.content["arrays"].items())
        arrays["layer4.0.bn1.weight"] = Array("float32", (32,), "numpy.ndarray", data)
        reply.content["arrays"] = ArrayRecord(arrays)

    refusals = run_with(tmp_path, small(stream={"tasks": 1}, server={"aggregation": "suffix"}), spoil).refusals
    assert [device for device, _ in refusals] == [1]
    assert "'layer4.0.bn1.weight' cannot be decoded" in refusals[0][1]


def test_fp64_values_that_would_stop_the_average(tmp_path: Path) -> None:
    def spoil(reply: Message) -> None:
        arrays = dict(reply.content["arrays"].items())
        arrays["layer4.0.bn1.weight"] = Array(np.full(32, 1e300))
        reply.content["arrays"] = ArrayRecord(arrays)

    refusals = run_with(tmp_path, small(stream={"tasks": 1}, server={"aggregation": "suffix"}), spoil).refusals
    assert [device for device, _ in refusals] == [1]
    assert "beyond 3.4e+38" in refusals[0][1]


PLUS = {"name": "lightcl-plus", "share_statistics": True}


@pytest.mark.parametrize(
    ("factor", "count", "said"),
    [
        pytest.param(1e200, 1.0, "beyond 3.4e+38", id="sums that overflow when they are squared"),
        pytest.param(1e300, 1.0, "beyond 3.4e+38", id="sums that overflow when they are added"),
        pytest.param(1.0, 0.3, "a fraction of a sample", id="a third of each sample"),
    ],
)
def test_class_sums_that_would_spoil_the_fleets_head(tmp_path: Path, factor: float, count: float, said: str) -> None:
    def spoil(reply: Message) -> None:
        arrays = {name: array.numpy() for name, array in reply.content["arrays"].items()}
        for name in ("total", "gram"):
            arrays[f"statistics/{name}"] = arrays[f"statistics/{name}"] * factor
        arrays["statistics/count"] = arrays["statistics/count"] * count
        reply.content["arrays"] = ArrayRecord({name: Array(array) for name, array in arrays.items()})

    refusals = run_with(tmp_path, small(stream={"tasks": 1}, method=PLUS), spoil).refusals
    assert refusals, "it sends its sums again with the next reply"
    assert {device for device, _ in refusals} == {1}
    assert said in refusals[0][1]


def test_class_sums_of_a_type_that_pytorch_cannot_take(tmp_path: Path) -> None:
    """They are refused with the reply, not found where the sums of all devices are solved."""

    def spoil(reply: Message) -> None:
        arrays = {name: array.numpy() for name, array in reply.content["arrays"].items()}
        reply.content["arrays"] = ArrayRecord({name: Array(a.astype(np.longdouble)) for name, a in arrays.items()})

    listener = run_with(tmp_path, small(stream={"tasks": 1}, method=PLUS), spoil)
    assert {device for device, _ in listener.refusals} == {1}
    assert "expected floating-point values (float16, float32, float64)" in listener.refusals[0][1]
    assert not listener.warnings


def test_the_device_is_found_whose_sums_raise_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    scenario = small(method=PLUS)
    sums = ClassSums(scenario.method.build(build_network(scenario, in_channels=1, classes=10)), "off", pytest.fail)
    good = {name: np.zeros_like(array) for name, array in sums.sums.items()}
    good["statistics/count"][0] = 1
    bad = good | {"statistics/count": 7 * good["statistics/count"]}

    def solve(method: Any, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if given["statistics/count"].sum() >= 7:
            raise TypeError("not this one")
        return {}

    monkeypatch.setattr("server.aggregation.statistics.outgoing_head", solve)
    refused = {1: "no finite head can be solved from its class sums"}
    assert sums.update_({0: good, 1: bad, 2: good}, 1) == ({0, 2}, refused)


def test_sums_that_are_in_count_although_the_weights_cannot_be_averaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the devices would send the same sums again, and they would be in twice."""
    scenario = small(stream={"tasks": 1}, method=PLUS, server={"aggregation": "suffix"})

    def fail(*given: Any) -> None:
        raise RuntimeError("no average")

    monkeypatch.setattr("server.aggregation.weights.strategies.FedAvg.aggregate_train", fail)
    folder, listener = RunFolder(tmp_path / "run"), Silent()
    folder.begin(scenario, {"run": "r"}, [])
    coordinator = Coordinator(scenario, folder, "r", listener)
    coordinator.run(InProcessGrid(tmp_path / "s", 3))
    why = "the weights cannot be averaged (RuntimeError: no average); they stay as they are"
    assert listener.warnings == [f"round 1: {why}"]
    assert [entry.summed for entry in coordinator.ledger.entries] == [(0,)] * 3
    assert coordinator.aggregator is not None
    assert coordinator.aggregator.version == 1, "the head is new"
    assert coordinator.aggregator.sums["statistics/count"].sum() == 80 + 94 + 85


def test_sums_without_a_head_are_left_out() -> None:
    scenario = small(method=PLUS)
    method = scenario.method.build(build_network(scenario, in_channels=1, classes=10))
    warnings: list[str] = []
    sums = ClassSums(method, "off", warnings.append)
    features = np.random.default_rng(0).normal(size=(50, sums.sums["statistics/total"].shape[1]))
    good = {name: np.zeros_like(array) for name, array in sums.sums.items()}
    good["statistics/count"][3], good["statistics/total"][3] = 50, features.sum(axis=0)
    good["statistics/gram"] = (features.T @ features)[np.triu_indices(features.shape[1])]
    assert sums.update_({0: good}, 1) == ({0}, {})
    before, head = {name: array.copy() for name, array in sums.sums.items()}, sums.head
    huge = {name: array * (1.0 if name.endswith("count") else 1e37) for name, array in good.items()}
    negative = good | {"statistics/gram": -1e6 * good["statistics/gram"]}
    for bad in (huge, negative):
        summed, refused = sums.update_({1: bad}, 2)
        assert (summed, refused) == (set(), {1: "no finite head can be solved from its class sums"})
        assert sums.head is head
        assert all((sums.sums[name] == array).all() for name, array in before.items())
        summed, refused = sums.update_({0: good, 1: bad}, 2)
        assert (summed, set(refused)) == ({0}, {1}), "the sums of the others of the round count"
        sums.sums, sums.head = {name: array.copy() for name, array in before.items()}, head
    assert sums.update_({0: good}, 3) == ({0}, {})
    assert not warnings
