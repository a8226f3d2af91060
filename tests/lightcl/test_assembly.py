"""From a scenario to the network that every device starts with."""

import pytest
import torch
from safetensors.torch import save_file

from lightcl.assembly import build_network
from lightcl.errors import RequestError
from lightcl.networks.weights import save_weights
from tests.lightcl import toys


def build(**sections):
    return build_network(toys.scenario(**sections), in_channels=3, classes=4)


def test_same_seed_same_network_whatever_torchs_global_generator_did():
    first = build(seed=3)
    torch.rand(5)
    toys.assert_same(build(seed=3).state_dict(), first.state_dict())
    assert "conv1.weight" in toys.changed(build(seed=4).state_dict(), first.state_dict())


def test_global_generator_is_left_alone():
    before = torch.get_rng_state()
    build()
    assert torch.equal(torch.get_rng_state(), before)


def test_the_default_width_is_the_papers():
    assert build(network={"width": None}).width == 64


def test_network_is_channels_last():
    assert build().layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("method", "prefix_ends", "frozen_batch_norm"),
    [
        ({"name": "lightcl"}, "layer3.1", "eval"),
        ({"name": "lightcl", "preset": "paper"}, "layer3.1", "train"),
        ({"name": "sgd"}, None, "eval"),
    ],
)
def test_method_decides_what_is_frozen_by_default(method, prefix_ends, frozen_batch_norm):
    network = build(method=method)
    assert (network.prefix.blocks or (None,))[-1] == prefix_ends
    assert network.frozen_batch_norm == frozen_batch_norm


def test_scenario_overrides_the_methods_defaults():
    network = build(network={"freeze": "layer2.0", "frozen_batch_norm": "train"})
    assert network.prefix.blocks[-1] == "layer2.0"
    assert network.frozen_batch_norm == "train"


def test_impossible_freeze_point_is_refused():
    with pytest.raises(RequestError, match="'layer9' is not a block"):
        build(network={"freeze": "layer9"})


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_width_and_stem_are_those_of_the_file_and_the_head_is_not(tmp_path, stem):
    stored = toys.network(width=5, stem=stem, seed=8, classes=11)
    save_weights(stored, tmp_path / "own.safetensors", {})
    network = build(network={"weights": str(tmp_path / "own.safetensors"), "width": None})
    assert (network.width, network.stem_kind, network.classes) == (5, stem, 4)
    expected = {name: t.half().float() for name, t in stored.prefix.state_dict().items() if t.is_floating_point()}
    toys.assert_same({name: network.prefix.state_dict()[name] for name in expected}, expected)


def test_width_that_contradicts_the_file_is_refused(tmp_path):
    save_weights(toys.network(width=5), tmp_path / "own.safetensors", {})
    message = r"own.safetensors'?: tensor 'conv1.weight' has shape \[5, 3, 3, 3\].*leave network.width .* out"
    with pytest.raises(RequestError, match=message):
        build(network={"weights": str(tmp_path / "own.safetensors"), "width": 8})


@pytest.mark.parametrize("width", [None, 4])
def test_a_file_without_tensors_is_refused(tmp_path, width):
    save_file({}, tmp_path / "empty.safetensors")
    with pytest.raises(RequestError, match=r"tensor 'conv1.weight' is missing"):
        build(network={"weights": str(tmp_path / "empty.safetensors"), "width": width})
