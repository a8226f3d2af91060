"""The measurement, on cases whose allocations are known, and on toy devices beside theory."""

import gc
import sys

import pytest
import torch

from lightcl.analysis.footprint import footprint
from lightcl.analysis.footprint.measured import (
    MeasurementFailure,
    measure,
    measure_here,
    peak_allocations,
    rehearsal,
    rehearsed_workload,
)
from lightcl.assembly import build_network
from lightcl.networks.native import convolution
from lightcl.networks.native.library import has_amx
from lightcl.scenario import Scenario
from tests.lightcl import toys

FLOATS = 1_000_000
CACHED = {"data": {"views": 2}, "device": {"accelerator": "cpu"}}
AT_ONCE = {"update": "at-once"}


def test_peak_of_allocations_by_hand():
    """One tensor stays (4 MB); in the second part two more live at once, then one after the other."""
    kept = []

    def both() -> None:
        first, second = torch.empty(FLOATS), torch.empty(2 * FLOATS)
        del first, second

    def in_turn() -> None:
        for _ in range(2):
            torch.empty(2 * FLOATS)

    peaks = peak_allocations(
        {
            "one": lambda: kept.append(torch.empty(FLOATS)),
            "both": both,
            "in turn": in_turn,
            "nothing": lambda: None,
        }
    )
    assert peaks == {"one": 4e6, "both": 16e6, "in turn": 12e6, "nothing": 4e6}


def test_activations_kept_for_the_backward_pass_are_measured():
    """exp keeps its result: 4 MB each for x (given), two results, and the gradients of both on the way back."""
    x = torch.zeros(FLOATS, requires_grad=True)
    peaks = peak_allocations({"all": lambda: x.exp().exp().sum().backward()})
    assert 12e6 <= peaks["all"] <= 16.1e6


def test_reference_cycles_of_an_earlier_measurement_do_not_count():
    """80 MB that go in the middle of the second measurement would make its peak look smaller."""
    gc.disable()
    try:

        def leave_a_cycle() -> None:
            left: list[object] = [torch.zeros(20 * FLOATS)]
            left.append(left)

        def collect_and_make() -> torch.Tensor:
            gc.collect()
            return torch.zeros(FLOATS)

        peak_allocations({"left": leave_a_cycle})
        assert peak_allocations({"part": collect_and_make}) == {"part": 4e6}
    finally:
        gc.enable()


def test_rehearsal_has_the_shape_of_the_weights_without_them():
    short, _ = rehearsal(toys.scenario(network={"weights": "builtin", "width": None}), (3, 32, 32), 4)
    assert (short.network.weights, short.network.width, short.network.stem) == ("none", 20, "cifar")


def test_rehearsal_keeps_what_decides_the_memory():
    scenario = toys.scenario(
        stream={"tasks": 3, "classes_per_task": 3, "class_order": "shuffled"},
        fleet={"devices": 7},
        training={"batch_size": 6, "momentum": 0.5},
        server={"aggregation": "suffix"},
    )
    short, source = rehearsal(scenario, (1, 12, 10), 9)
    assert short.network == scenario.network.model_copy(update={"stem": "cifar"})
    assert short.method == scenario.method
    assert (short.training.batch_size, short.training.momentum) == (6, 0.5)
    assert source.train.images.shape == (36, 12, 10, 1)
    assert len(source.classes) == 9
    workload = rehearsed_workload(scenario, (1, 12, 10), 9)
    assert workload.images == (18, 18)
    assert workload.momentum


@pytest.mark.parametrize(
    "changes",
    [
        {"method": {"name": "sgd"}},
        {"method": {"name": "sgd"}, "training": {"momentum": 0.9}},
        {"method": {"name": "joint"}, "network": {"weights": "none", "width": 16, "stem": "imagenet"}},
        {"method": {"name": "sgd"}, "training": {"optimizer": "adam"}},
        {"method": {"name": "sgd"}, "training": {"optimizer": "adam", "weight_decay": 0.1}},
        {"method": {"name": "lightcl"}, "training": {"optimizer": "adamw", "weight_decay": 0.1}},
        {"method": {"name": "lightcl-sparse"}, "training": {"optimizer": "adamw"}},
        {"method": {"name": "lightcl"}},
        {"method": {"name": "lightcl", "beta": 0}},
        {"method": {"name": "lightcl"}, "network": {"weights": "none", "width": 16, "freeze": "layer1"}},
        {"method": {"name": "lightcl-sparse"}},
        {"method": {"name": "sgd"}, "device": {"precision": "bf16", "accelerator": "cpu"}},
        {"method": {"name": "lightcl"}, "device": {"precision": "bf16", "accelerator": "cpu"}},
        {"method": {"name": "lightcl"}} | CACHED,
        {"method": {"name": "lightcl", "memory_pass": "joint"}, "training": AT_ONCE} | CACHED,
        {"method": {"name": "lightcl", "memory_pass": "joint"}, "training": AT_ONCE}
        | CACHED
        | {"device": {"convolutions": "winograd", "accelerator": "cpu"}},
        {"method": {"name": "lightcl-sparse", "memory_pass": "joint"}, "training": AT_ONCE} | CACHED,
        {"data": {"views": 2}, "device": {"prefix_cache": "off", "accelerator": "cpu"}},
    ],
    ids=lambda changes: "-".join(str(value) for section in changes.values() for value in section.values()),
)
def test_measured_is_what_theory_counts(changes):
    check_measured(changes)


@toys.needs_compiler
@pytest.mark.parametrize(
    ("changes", "precision", "threads", "amx"),
    [
        ({"method": {"name": "lightcl", "memory_pass": "joint"}, "training": AT_ONCE} | CACHED, "fp32", 1, False),
        ({"method": {"name": "lightcl", "memory_pass": "joint"}, "training": AT_ONCE} | CACHED, "fp32", 2, False),
        ({"method": {"name": "lightcl"}, "network": {"weights": "none", "width": 32}}, "fp32", 3, False),
        ({"method": {"name": "lightcl"}}, "bf16", 1, False),
        ({"method": {"name": "lightcl"}}, "bf16", 1, True),
        ({"method": {"name": "sgd"}, "network": {"weights": "none", "width": 32}}, "bf16", 2, True),
        ({"method": {"name": "lightcl", "memory_pass": "joint"}, "training": AT_ONCE} | CACHED, "bf16", 1, True),
        ({"method": {"name": "sgd"}}, "fp32", 1, False),
        (
            {"method": {"name": "sgd"}, "network": {"weights": "none", "width": 32, "freeze": "layer4"}},
            "fp32",
            1,
            False,
        ),
        (
            {"method": {"name": "lightcl-sparse"}, "network": {"weights": "none", "width": 32}} | CACHED,
            "fp32",
            1,
            False,
        ),
    ],
)
def test_so_it_is_with_a_step_in_c(monkeypatch, changes, precision, threads, amx):
    if amx and not has_amx():
        pytest.skip("without AMX, PyTorch's products in bf16 take other memory")
    monkeypatch.setattr(convolution, "has_amx", lambda: amx)
    device = {"convolutions": "native", "precision": precision, "accelerator": "cpu", "threads": threads}
    check_measured(changes | {"device": device})


def check_measured(changes):
    """Wide enough that what theory leaves out does not matter."""
    scenario = toys.scenario(**({"network": {"weights": "none", "width": 16}} | changes))
    image, classes = (3, 32, 32), 4
    network = build_network(scenario, in_channels=3, classes=classes)
    theory = footprint(network, scenario.method.cost_on(network), rehearsed_workload(scenario, image, classes))
    measured = measure_here(scenario, image, classes, "tensors")
    assert measured["accelerator"] == "cpu"
    assert 0.95 < measured["training"] / theory.peak < 1.05
    assert measured["evaluation"] <= 1.05 * measured["training"]


def test_the_cache_is_filled_for_a_head_of_any_size():
    """Random weights depend on the number of classes; the rehearsal has four, the data set ten."""
    scenario = toys.scenario(network={"weights": "none", "width": 16}, method={"name": "lightcl"}, **CACHED)
    image, classes = (3, 32, 32), 10
    network = build_network(scenario, in_channels=3, classes=classes)
    theory = footprint(network, scenario.method.cost_on(network), rehearsed_workload(scenario, image, classes))
    measured = measure_here(scenario, image, classes, "tensors")
    assert 0.95 < measured["training"] / theory.peak < 1.05


@pytest.mark.parametrize("method", ["ewc", "pnn", "er", "sparcl-derpp", "lightcl-plus"])
def test_the_other_methods_need_about_what_theory_counts(method):
    scenario = toys.scenario(
        method={"name": method}, network={"weights": "none", "width": 16}, training={"batch_size": 16, "epochs": 2}
    )
    image, classes = (3, 32, 32), 4
    network = build_network(scenario, in_channels=3, classes=classes)
    theory = footprint(network, scenario.method.cost_on(network), rehearsed_workload(scenario, image, classes))
    assert 0.9 < measure_here(scenario, image, classes, "tensors")["training"] / theory.peak < 1.25


def test_a_failing_measurement_says_why(monkeypatch, tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho all is lost >&2\nexit 3\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(MeasurementFailure, match="method lightcl could not be measured: all is lost"):
        measure(toys.scenario(), (3, 8, 8), 4)


@pytest.mark.slow
def test_lightcl_needs_half_of_sgds_memory_at_the_papers_setting():
    """Width 64, batch 32, memory 15, 32x32, measured one after the other: what the README promises."""
    peaks, ratios = {}, {}
    for method in ("sgd", "lightcl", "lightcl-sparse"):
        paper = {"network": {"weights": "none", "width": 64}, "training": {"batch_size": 32}}
        scenario = Scenario.model_validate(paper | {"method": {"name": method}, "fleet": {"devices": 1}})
        network = build_network(scenario, in_channels=3, classes=10)
        cost = scenario.method.cost_on(network)
        theory = footprint(network, cost, rehearsed_workload(scenario, (3, 32, 32), 10)).peak
        peaks[method] = measure(scenario, (3, 32, 32), 10).training
        ratios[method] = peaks[method] / theory
    assert peaks["lightcl"] <= 0.65 * peaks["sgd"]
    assert peaks["lightcl-sparse"] <= 0.25 * peaks["sgd"]
    assert 0.9 <= ratios["lightcl"] <= 1.25
    assert 0.9 <= ratios["lightcl-sparse"] <= 1.25
