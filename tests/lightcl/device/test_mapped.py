"""Weights of the prefix in a mapped file."""

import copy
import errno
from pathlib import Path

import pytest
import torch

from lightcl.device.mapped import MappedWeights
from lightcl.device.prefix import FixedPrefix
from tests.lightcl import toys


def prefix_network():
    return toys.network(freeze="layer3").to(memory_format=torch.channels_last).eval()


def test_the_network_computes_the_same_before_and_after_its_pages_are_released(tmp_path):
    network, images = prefix_network(), toys.images(3, size=32)
    state = toys.copy_of(network.state_dict())
    strides = {name: p.stride() for name, p in network.named_parameters()}
    expected = network(images)
    mapped = MappedWeights(network.prefix, tmp_path)
    assert torch.equal(network(images), expected)
    mapped.release()
    assert torch.equal(network(images), expected)
    toys.assert_same(network.state_dict(), state)
    assert {name: p.stride() for name, p in network.named_parameters()} == strides


def test_the_suffix_stays_in_memory_and_learns(tmp_path):
    network = prefix_network()
    places = {name: p.data_ptr() for name, p in network.suffix.named_parameters()}
    MappedWeights(network.prefix, tmp_path)
    assert {name: p.data_ptr() for name, p in network.suffix.named_parameters()} == places
    assert not any(p.requires_grad for p in network.prefix.parameters())


def test_the_same_weights_share_a_file_and_a_damaged_one_is_written_again(tmp_path):
    network, images = prefix_network(), toys.images(3, size=32)
    expected, twin, third = network(images), copy.deepcopy(network), copy.deepcopy(network)
    MappedWeights(network.prefix, tmp_path)
    MappedWeights(twin.prefix, tmp_path)
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    file.unlink()  # not in place: the others have it mapped
    file.write_bytes(content[:-8] + bytes(8) if content[-8:] != bytes(8) else content[:100])
    MappedWeights(third.prefix, tmp_path)
    assert file.read_bytes() == content
    for each in (network, twin, third):
        assert torch.equal(each(images), expected)


def test_a_mapping_is_made_once_for_devices_that_share_the_prefix(tmp_path):
    network = prefix_network()
    shared = {id(module): module for module in network.prefix.modules()}
    other = copy.deepcopy(network, shared)
    assert MappedWeights.of(network.prefix, tmp_path) is MappedWeights.of(other.prefix, tmp_path)


def test_a_folder_that_cannot_be_written_to_is_an_error_and_changes_nothing(tmp_path):
    network = prefix_network()
    places = [p.data_ptr() for p in network.prefix.parameters()]
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        MappedWeights(network.prefix, tmp_path / "file" / "weights")
    assert [p.data_ptr() for p in network.prefix.parameters()] == places


def test_a_cached_device_has_its_prefix_on_disk_and_lets_go_of_the_copy(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTCL_CACHE", str(tmp_path / "cache"))
    device = toys.device(tmp_path / "state", data={"views": 2})
    device.train(0, 2)
    features = device.method.prefix_features
    assert isinstance(features, FixedPrefix)
    assert features._stage is None
    assert len(list((tmp_path / "cache" / "weights").iterdir())) == 1


def test_a_full_disk_leaves_no_part_of_a_file(tmp_path, monkeypatch):
    def full(file: Path, content: bytes) -> int:
        with file.open("wb") as handle:
            handle.write(content[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        MappedWeights(prefix_network().prefix, tmp_path / "weights")
    assert list((tmp_path / "weights").iterdir()) == []
