"""Linear CKA by hand and against its literal twin; what an analysis compares; the freeze point."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightcl.analysis.generalizability import (
    BlockFigures,
    Generalizability,
    LinearCKA,
    analyze,
    analyzed_scenario,
    block_similarity,
)
from lightcl.assembly import build_network
from lightcl.device.device import EdgeDevice, OutOfStep
from lightcl.errors import RequestError
from tests.lightcl import toys
from tests.reference import cka as reference


def cka(x: Tensor, y: Tensor, batch: int = 1000) -> float:
    similarity = LinearCKA()
    for start in range(0, len(x), batch):
        similarity.add(x[start : start + batch], y[start : start + batch])
    return similarity.value()


def noise(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def test_cka_by_hand() -> None:
    # x is centered: (-1, 0, 1). y = (0, 0, 3) has mean 1, centered (-1, -1, 2).
    # ⟨x, y⟩ = 1 + 0 + 2 = 3, ‖x‖² = 2, ‖y‖² = 6: CKA = 3² / (2 · 6) = 0.75 (one column: the squared correlation).
    assert cka(torch.tensor([[-1.0], [0.0], [1.0]]), torch.tensor([[0.0], [0.0], [3.0]])) == pytest.approx(0.75)
    # Two columns against one. X centered = rows (1, 1), (1, -1), (-1, 1), (-1, -1); Y = first column.
    # YᵀX = (4, 0), XᵀX = 4·I, YᵀY = 4: CKA = 16 / (4·√2 · 4) = 1 / √2.
    x = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    assert cka(x, x[:, :1]) == pytest.approx(1 / math.sqrt(2))
    assert cka(x[:, 1:], x[:, :1]) == pytest.approx(0.0, abs=1e-12)


def test_cka_equals_its_literal_twin_for_any_batches() -> None:
    x, y = noise(23, 5, 1), noise(23, 3, 2)
    y = y + x[:, :3]
    expected = reference.linear_cka(x.tolist(), y.tolist())
    assert 0.1 < expected < 0.9
    for batch in (1, 4, 23):
        assert cka(x, y, batch) == pytest.approx(expected, abs=1e-9)
    far = x + 1e4  # what float32 sums of products would lose; the addition itself rounds to about 1e-3
    assert cka(far, y) == pytest.approx(reference.linear_cka(far.tolist(), y.tolist()), abs=1e-9)


def test_cka_is_invariant_to_rotation_scale_and_shift_but_not_to_a_general_linear_map() -> None:
    x, y = noise(50, 4, 3).double(), noise(50, 4, 4).double()
    rotation = torch.linalg.qr(noise(4, 4, 5).double()).Q
    plain = cka(x, y)
    assert cka(x @ rotation, y) == pytest.approx(plain, abs=1e-12)
    assert cka(x, -7 * y + 3) == pytest.approx(plain, abs=1e-12)
    assert cka(x, x @ rotation) == pytest.approx(1, abs=1e-12)
    assert cka(y, x) == pytest.approx(plain, abs=1e-12)
    assert cka(x, x * torch.tensor([1.0, 1.0, 1.0, 30.0])) < 0.9


def test_features_that_do_not_vary() -> None:
    constant = torch.full((6, 2), 0.1)
    assert cka(constant, noise(6, 2, 6)) == 0
    assert cka(constant, 3 * constant) == 1


def test_block_similarity_compares_every_position_of_every_blocks_last_map() -> None:
    one, other = toys.network(seed=1), toys.network(seed=2)
    images = toys.images(5, size=8)
    found = block_similarity(one, other, images.split(2))
    assert list(found) == list(one.block_names)
    x, y = images, images
    with torch.no_grad():
        for name in ("stem", "layer1.0", "layer1.1", "layer2.0"):
            x, y = one.eval().run_block(name, x), other.eval().run_block(name, y)
    rows = [[m[n, :, h, w].tolist() for n in range(5) for h in range(4) for w in range(4)] for m in (x, y)]
    assert found["layer2.0"] == pytest.approx(reference.linear_cka(*rows), abs=1e-6)


def test_a_changed_block_does_not_affect_the_blocks_before_it() -> None:
    one, other = toys.network(seed=1), toys.network(seed=1)
    with torch.no_grad():
        other.get_submodule("layer3.1.conv1").weight.neg_()
    found = block_similarity(one, other, [toys.images(6, size=16)])
    names = list(found)
    before = names[: names.index("layer3.1")]
    assert [found[name] for name in before] == pytest.approx([1.0] * len(before), abs=1e-9)
    assert found["layer3.1"] < 0.99


# -- the analysis --------------------------------------------------------------------------------------------------


def test_an_analysis_is_that_of_devices_trained_by_hand(tmp_path: Path) -> None:
    held = toys.source(classes=6, size=16)
    scenario = toys.scenario(stream={"tasks": 3}, network={"freeze": "layer3"}, training={"epochs": 1})
    steps: list[tuple[str, int, int]] = []
    found = analyze(scenario, 0, held, toys.whole(held), lambda *step: steps.append(step))

    assert [done for _, done, _ in steps] == [1, 2, 3, 4, 5]
    assert steps[2] == ("task 2 alone", 3, 5)
    plain = analyzed_scenario(scenario)
    assert plain.method.name == "sgd"

    def learned(folder: str, *tasks: int) -> EdgeDevice:
        device = EdgeDevice(plain, 0, tmp_path / folder, source=held, share=toys.whole(held))
        device.skip_to(tasks[0])
        for task in tasks:
            device.train(task, 1)
        return device

    def probes(*tasks: int) -> list[Tensor]:
        """All images of a task: they are fewer than an analysis takes. Their order does not matter."""
        return [s.load().images for t in tasks for s in (stream[t].held_out, stream[t].train)]

    first, second, third = learned("a", 0), learned("b", 0, 1), learned("c", 0, 1, 2)
    alone = learned("d", 2)
    stream = first.stream
    stable = [
        block_similarity(first.network, second.network, probes(0)),
        block_similarity(second.network, third.network, probes(0, 1)),
    ]
    plastic = block_similarity(third.network, alone.network, probes(2))
    ready = block_similarity(build_network(plain, in_channels=3, classes=6), alone.network, probes(2))
    for name, block in found.blocks.items():
        assert block.stability == pytest.approx([similarity[name] for similarity in stable], abs=1e-6)
        assert block.plasticity[1] == pytest.approx(plastic[name], abs=1e-6)
        assert block.readiness[1] == pytest.approx(ready[name], abs=1e-6)
    assert plastic["layer4.1"] < 0.999, "the past has left no trace: nothing was compared"


def test_the_scenario_that_an_analysis_trains() -> None:
    scenario = toys.scenario(network={"freeze": "auto", "analysis_epochs": 3}, training={"epochs": 50})
    plain = analyzed_scenario(scenario)
    assert (plain.network.freeze, plain.training.epochs, plain.training.batch_size) == ("none", 3, 8)
    assert analyzed_scenario(toys.scenario(training={"epochs": 2})).training.epochs == 2
    with pytest.raises(RequestError, match=r"stream\.tasks is 1"):
        analyzed_scenario(toys.scenario(stream={"tasks": 1}))


def test_a_device_that_has_begun_cannot_skip_tasks(tmp_path: Path) -> None:
    device = toys.device(tmp_path, method={"name": "sgd"})
    with pytest.raises(OutOfStep):
        device.skip_to(2)
    device.train(0, 1)
    with pytest.raises(OutOfStep):
        device.skip_to(1)


def test_no_network_is_built_with_auto() -> None:
    with pytest.raises(RequestError, match="lightcl analyze"):
        build_network(toys.scenario(network={"freeze": "auto"}), in_channels=3, classes=4)


# -- the freeze point ----------------------------------------------------------------------------------------------


def figures(**blocks: tuple[list[float], list[float]]) -> Generalizability:
    return Generalizability(
        0,
        1,
        {name.replace("_", "."): BlockFigures(ms, lp, [0.0] * len(ms)) for name, (ms, lp) in blocks.items()},
        (1, 2),
    )


def test_the_freeze_point_is_the_last_block_of_an_unbroken_run_from_the_first() -> None:
    found = figures(
        stem=([1.0, 1.0], [1.0, 1.0]),
        layer1_0=([1.0, 0.8], [0.95, 0.95]),  # the mean counts: 0.9
        layer1_1=([0.99, 0.99], [0.9, 0.8]),  # LP 0.85
        layer2_0=([0.99, 0.99], [0.99, 0.99]),
        layer2_1=([0.2, 0.2], [0.2, 0.2]),
    )
    assert found.freeze_point(0.9) == "layer1.0"
    assert found.freeze_point(0.85) == "layer2.0"
    assert found.freeze_point(0.99) == "stem"
    assert found.freeze_point(0.0) == "layer2.0", "the last block stays trained"
    assert figures(stem=([0.5], [1.0]), layer1_0=([1.0], [1.0])).freeze_point(0.9) == "none"
