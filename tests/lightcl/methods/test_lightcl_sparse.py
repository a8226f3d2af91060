"""LightCL on a pruned network: its keys, and the network, training and state of a device."""

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from lightcl.assembly import build_network
from lightcl.device.device import EdgeDevice
from lightcl.errors import RequestError
from lightcl.exchange.tensors import outgoing, size_in_bytes
from lightcl.methods.base import StepCost
from lightcl.methods.lightcl import LightCLParameters
from lightcl.methods.lightcl_sparse import LightCLSparseParameters
from lightcl.networks.pruning import choose_channels
from lightcl.networks.resnet import StagedResNet
from lightcl.networks.weights import digest, save_weights
from lightcl.scenario import load_scenario
from lightcl.storage.state import StateError
from tests.inprocess import small
from tests.lightcl import toys

SPARSE = {"method": {"name": "lightcl-sparse", "memory_size": 5, "beta": 0.001}}


def build(**sections) -> StagedResNet:
    return build_network(toys.scenario(**(SPARSE | sections)), in_channels=3, classes=4)


def test_a_layer_left_out_has_the_papers_share():
    parameters = LightCLSparseParameters(channel_sparsity={"layer4": 0.5})
    assert parameters.channel_sparsity == {"layer1": 0.2, "layer2": 0.2, "layer3": 0.7, "layer4": 0.5}


@pytest.mark.parametrize("wrong", [{"layer4": 1.0}, {"layer4": -0.1}, {"layer5": 0.5}, {"layer4": "all"}, 0.5])
def test_impossible_shares_are_refused(wrong):
    with pytest.raises(ValidationError):
        LightCLSparseParameters(channel_sparsity=wrong)


def test_an_unknown_layer_is_named_with_those_that_there_are(tmp_path: Path):
    file = tmp_path / "mine.yaml"
    file.write_text("method:\n  name: lightcl-sparse\n  channel_sparsity: {stem: 0.2}\n")
    with pytest.raises(
        RequestError, match=r"line 3: method\.channel_sparsity\.stem: .*'layer1', 'layer2'.*not \"stem\""
    ):
        load_scenario(file)
    with pytest.raises(RequestError, match=r"--set method\.channel_sparsity\.layer4: .*less than 1, not 1"):
        load_scenario(file, ["method.channel_sparsity={layer1: 0.1}", "method.channel_sparsity.layer4=1"])


def test_the_network_is_pruned_by_its_loaded_weights(tmp_path: Path):
    """Not by its random initial weights, and the same on every machine that has the file."""
    stored = toys.network(seed=8)
    save_weights(stored, tmp_path / "w.safetensors", {})
    network = build(network={"weights": str(tmp_path / "w.safetensors"), "width": None})
    expected = choose_channels(stored, LightCLSparseParameters().channel_sparsity)
    toys.assert_same(network.kept_channels, expected)
    index = expected["layer3.0.conv1"]
    given = stored.layer3[0].conv1.weight.detach()[index][:, expected["layer2"]].half().float()
    assert torch.equal(network.layer3[0].conv1.weight, given)
    assert network.layer4[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)


def test_devices_share_the_pruned_prefix():
    assert digest(build().prefix) == digest(build().prefix) != digest(build(seed=1).prefix)
    assert digest(build().prefix) != digest(build(method={"name": "lightcl"}).prefix)


def test_channel_score_decides_which_channels_go():
    other = build(method={"name": "lightcl-sparse", "channel_score": "magnitude"})
    assert toys.changed(other.kept_channels, build().kept_channels)


def test_two_tasks_of_digits_are_learned(tmp_path: Path):
    scenario = small(
        method={"name": "lightcl-sparse"}, network={"width": 8}, fleet={"devices": 1}, stream={"tasks": 5},
        training={"epochs": 3, "learning_rate": 0.05},
    )  # fmt: skip
    device = EdgeDevice(scenario, 0, tmp_path)
    for task in (0, 1):
        device.train(task, 3)
        device.evaluate()
    assert device.matrix("til").values[1, :2].min() > 0.75  # two classes a task, 72 test images each: chance is 0.5
    assert device.matrix("cil").values[1, :2].mean() > 0.45  # four of ten classes


def test_learning_ends_the_same_after_restarts_and_is_smaller_in_state_and_messages(tmp_path: Path):
    """Two tasks with feature memory, in one go and reopened before every round."""
    sections = SPARSE | {"training": {"epochs": 4, "learning_rate": 0.01, "momentum": 0.9}}
    straight = toys.device(tmp_path / "straight", **sections)
    untrained = toys.copy_of(straight.network.state_dict())
    for task in (0, 1):
        straight.train(task, 4)
        straight.evaluate()
    for task, until in ((0, 2), (0, 4), (1, 1), (1, 4)):
        toys.device(tmp_path / "restarted", **sections).train(task, until)
    restarted = toys.device(tmp_path / "restarted", **sections)
    restarted.evaluate()
    toys.assert_same(restarted.network.state_dict(), straight.network.state_dict())
    toys.assert_same(restarted.method.state_dict(), straight.method.state_dict())
    assert {name: len(mask) for name, mask in straight.method.vital.items()} == dict.fromkeys(
        straight.network.suffix.map_names, 6  # of 32
    )  # fmt: skip
    moved = toys.changed(straight.network.state_dict(), untrained)
    assert moved >= {name for name, p in straight.network.named_parameters() if p.requires_grad}
    assert not moved & set(straight.network.prefix.state_dict())

    dense = toys.device(tmp_path / "dense", **sections | {"method": {"name": "lightcl"}})
    dense.train(0, 1)

    def on_disk(name: str) -> int:
        return sum(file.stat().st_size for file in (tmp_path / name).glob("tensors-*.safetensors"))

    assert on_disk("restarted") < 0.2 * on_disk("dense")
    assert size_in_bytes(outgoing(straight.network, "suffix")) < 0.1 * size_in_bytes(outgoing(dense.network, "suffix"))


def test_state_saved_with_other_channels_is_not_taken_over(tmp_path: Path):
    """The same shapes with other channels: a node whose weights file was replaced between two messages."""
    file = tmp_path / "w.safetensors"
    sections = SPARSE | {"network": {"weights": str(file), "width": None}}
    save_weights(toys.network(seed=1), file, {})
    toys.device(tmp_path / "state", **sections).train(0, 1)
    toys.device(tmp_path / "state", **sections)
    save_weights(toys.network(seed=2), file, {})
    with pytest.raises(StateError, match="was saved with other channels"):
        toys.device(tmp_path / "state", **sections)


def test_a_step_costs_the_same_as_lightcls():
    assert (
        LightCLSparseParameters().cost()
        == LightCLParameters().cost()
        == StepCost(suffix_samples=15, pattern_samples=15, vital_ratio=0.15)
    )
    assert LightCLSparseParameters(beta=0).cost() == StepCost()
