"""Each method on a small real stream: five tasks of two digits, on which plain SGD forgets nearly everything.

A width-8 network from random weights, 8 epochs a task at learning rate 0.03, one of three devices, seed 0. The figures
of all methods, over more seeds, are in docs/results/digits-methods.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest

from lightcl.device.device import EdgeDevice
from tests.lightcl import toys


class Outcome(NamedTuple):
    """In 0..1; `cil` is None where it is not tested."""

    til: float
    til_forgetting: float
    cil: float | None


def learn(folder: Path, method: dict[str, Any], **sections: Any) -> Outcome:
    stream = {
        "data": {"source": "digits", "augmentation": "none"},
        "stream": {"tasks": 5, "classes_per_task": 2},
        "fleet": {"devices": 3, "test_data": "whole"},
        "network": {"weights": "none", "width": 8},
        "training": {"epochs": 8, "batch_size": 16, "learning_rate": 0.03},
    }
    scenario = toys.scenario(method=method, **{**stream, **sections})
    device = EdgeDevice(scenario, 0, folder)
    for task in range(5):
        device.train(task, scenario.training.epochs)
        device.evaluate()
    til = device.matrix("til")
    cil = device.matrix("cil").average_accuracy() if "cil" in scenario.settings else None
    return Outcome(til.average_accuracy(), til.forgetting(), cil)


@pytest.fixture(scope="module")
def sgd(tmp_path_factory) -> Outcome:
    return learn(tmp_path_factory.mktemp("sgd"), {"name": "sgd"})


def test_sgd_forgets(sgd):
    assert sgd.til_forgetting > 0.3
    assert sgd.til < 0.7


@pytest.mark.parametrize("method", [
    {"name": "er"}, {"name": "derpp"}, {"name": "fdr"}, {"name": "sparcl-er"}, {"name": "sparcl-derpp"},
], ids=lambda method: method["name"])  # fmt: skip
def test_replay_forgets_less(tmp_path, sgd, method):
    given = learn(tmp_path, method)
    assert given.til_forgetting < sgd.til_forgetting - 0.15
    assert given.til > sgd.til + 0.15
    assert given.cil > sgd.cil + 0.15


@pytest.mark.parametrize("method", [{"name": "lightcl"}, {"name": "lightcl-sparse"}, {"name": "lightcl-plus"}],
                         ids=lambda method: method["name"])  # fmt: skip
def test_methods_without_old_images_forget_less(tmp_path, sgd, method):
    """At seeds 1 and 2 SGD forgets 18 and 9 points; LightCL 8 and 7, lightcl-sparse 11 and 10, lightcl-plus none."""
    given = learn(tmp_path, method)
    assert given.til_forgetting < sgd.til_forgetting - 0.15
    assert given.til > sgd.til


def test_columns_forget_nothing(tmp_path, sgd):
    given = learn(tmp_path, {"name": "pnn"})
    assert given.til_forgetting == 0
    assert given.til > sgd.til + 0.15


def test_ewc_holds_the_weights_that_matter(tmp_path):
    """Weighted by the Fisher information of the first task, the weights move less in the second one than without it.

    Whether less is forgotten is another question: not on average, and where it is depends on the rounding of the
    processor (docstring of lightcl/methods/ewc.py).
    """
    free, held = (sum(movement(tmp_path, strength, seed) for seed in (0, 3, 4)) for strength in (0.0, 10.0))
    assert held < 0.85 * free


def movement(folder: Path, strength: float, seed: int) -> float:
    """Σ F (θ - θ*)² after the second task of two digits each, with a pre-trained network."""
    scenario = toys.scenario(
        method={"name": "ewc", "fisher_samples": 60, "strength": strength},
        data={"source": "digits", "augmentation": "none"},
        fleet={"devices": 3, "test_data": "whole"},
        network={"weights": "builtin", "width": None},
        training={"epochs": 5, "batch_size": 16},
        seed=seed,
    )
    device = EdgeDevice(scenario, 0, folder / f"{strength}-{seed}")
    device.train(0, 5)
    fisher, anchor = dict(device.method.fisher), dict(device.method.anchor)
    device.train(1, 5)
    weights = {name: weight.detach() for name, weight in device.network.named_parameters()}
    return sum(float((fisher[name] * (weights[name] - anchor[name]).square()).sum()) for name in fisher)
