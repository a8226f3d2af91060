"""Weights files: written, read, refused; finding the built-in ones."""

import importlib.metadata
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn import functional as F

from lightcl.errors import RequestError
from lightcl.networks import weights
from lightcl.networks.resnet import StagedResNet
from lightcl.networks.weights import digest, find_builtin, load_weights, read_weights, save_weights
from tests.lightcl import toys


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The weights of `toys.network(seed=1)`."""
    save_weights(toys.network(seed=1), tmp_path / "folder" / "weights.safetensors", {"data": "toys"})
    return tmp_path / "folder" / "weights.safetensors"


def test_saved_weights_are_fp16_with_metadata(file):
    with safe_open(file, "pt") as stored:
        assert stored.metadata() == {"data": "toys"}
    tensors = read_weights(file)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert "bn1.running_var" in tensors
    assert not any(name.endswith("num_batches_tracked") for name in tensors)


def test_weights_survive_a_round_trip_through_the_file(file):
    network = toys.network(seed=2)
    load_weights(network, file, head=True)
    rounded = {
        name: tensor.half().float() if tensor.is_floating_point() else tensor
        for name, tensor in toys.network(seed=1).state_dict().items()
    }
    toys.assert_same(network.state_dict(), rounded)


def test_the_head_is_not_loaded_unless_requested(file):
    network = toys.network(seed=2, classes=9)  # of another size than the file's
    head = toys.copy_of(network.head.state_dict())
    load_weights(network, file, head=False)
    toys.assert_same(network.head.state_dict(), head)
    assert torch.equal(network.conv1.weight, toys.network(seed=1).conv1.weight.half().float())


def test_a_head_of_another_size_is_refused_if_requested(file):
    with pytest.raises(RequestError, match=r"'fc.weight' has shape \[4, 32\], this network .* needs \[9, 32\]"):
        load_weights(toys.network(classes=9), file, head=True)


def test_weights_of_another_width_are_refused(file):
    with pytest.raises(
        RequestError,
        match=rf"{re.escape(str(file))}: tensor 'conv1.weight' has shape \[4, 3, 3, 3\], this network "
        r"\(width 8, stem 'cifar'\) needs \[8, 3, 3, 3\]",
    ):
        load_weights(toys.network(width=8), file, head=False)


def test_missing_tensor_is_named(file):
    tensors = read_weights(file)
    del tensors["layer2.0.bn1.running_var"]
    save_file(tensors, file)
    with pytest.raises(RequestError, match=r"'layer2.0.bn1.running_var' is missing; .*network.weights=none"):
        load_weights(toys.network(), file, head=False)


def test_unknown_tensor_is_named_with_what_to_do(file):
    save_file(read_weights(file) | {"layer2.7.conv1.weight": torch.zeros(1)}, file)
    with pytest.raises(RequestError) as refused:
        load_weights(toys.network(), file, head=False)
    assert str(refused.value) == (
        f"{file}: tensor 'layer2.7.conv1.weight' is not in this network; the weights are for another network; name a "
        "file of weights for this one, or set network.weights=none to train from scratch"
    )


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (torch.full((8,), torch.nan, dtype=torch.float16), "holds NaN or infinity"),
        (torch.full((8,), torch.inf), "holds NaN or infinity"),
        (torch.ones(8, dtype=torch.int8), "is int8; allowed: floating point"),
    ],
)
def test_tensors_that_are_no_weights_are_named(file, broken, said):
    save_file(read_weights(file) | {"layer2.0.bn1.running_var": broken}, file)
    with pytest.raises(RequestError, match=rf"tensor 'layer2.0.bn1.running_var' {said}"):
        load_weights(toys.network(), file, head=False)


def test_missing_and_foreign_files_are_refused(tmp_path):
    with pytest.raises(RequestError, match=r"no such file: .*nowhere.safetensors"):
        read_weights(tmp_path / "nowhere.safetensors")
    (tmp_path / "text.safetensors").write_text("not weights at all")
    with pytest.raises(RequestError, match=r"text.safetensors: not a safetensors file"):
        read_weights(tmp_path / "text.safetensors")


def test_a_gray_network_loads_the_sum_over_colors(file):
    color, gray = toys.network(), toys.network(in_channels=1)
    load_weights(color, file, head=True)
    load_weights(gray, file, head=True)
    image = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        F.conv2d(image, gray.conv1.weight, padding=1),
        F.conv2d(image.expand(2, 3, 8, 8), color.conv1.weight, padding=1),
    )
    # From there on they are the same network.
    different = toys.changed(gray.state_dict() | {"conv1.weight": color.conv1.weight}, color.state_dict())
    assert different == set()


def test_digest_distinguishes_prefixes():
    network = toys.network(seed=1)
    fingerprint = digest(network.prefix)
    assert fingerprint == digest(toys.network(seed=1).prefix)
    assert fingerprint != digest(toys.network(seed=2).prefix)
    with torch.no_grad():
        network.fc.weight.zero_()  # no part of the prefix
        network.bn1.num_batches_tracked += 1  # has no influence on the function
    assert digest(network.prefix) == fingerprint
    with torch.no_grad():
        network.bn1.running_var[0] += 1e-6
    assert digest(network.prefix) != fingerprint


# -- the built-in file ---------------------------------------------------------------------------------------------


def test_builtin_weights_fit_the_package():
    file = find_builtin()
    assert file.stat().st_size < 3_000_000
    assert {tensor.dtype for tensor in read_weights(file).values()} == {torch.float16}
    network = StagedResNet(width=20, classes=3)
    load_weights(network, file, head=False)
    assert torch.isfinite(network.eval()(toys.images(2))).all()


def test_builtin_weights_come_with_a_card():
    card = find_builtin().with_suffix(".md").read_text()
    assert re.search(r"accuracy[^\n]*\d+\.\d+%", card)
    assert "tiny" in card.lower()


class Distribution:
    """As much of an installed distribution as the search asks for."""

    def __init__(self, root: Path, url: str | None) -> None:
        self.root, self.url = root, url

    def locate_file(self, path: str) -> Path:
        return self.root / path

    def read_text(self, name: str) -> str | None:
        return json.dumps({"url": self.url}) if self.url and name == "direct_url.json" else None


def place(root: Path) -> Path:
    file = root / "lightcl" / "networks" / "weights" / weights.BUILTIN
    file.parent.mkdir(parents=True)
    file.touch()
    return file


def test_builtin_weights_are_found_in_the_installed_package(tmp_path, monkeypatch):
    """Under Flower the code runs from an unpacked app bundle, which has no binary files."""
    monkeypatch.setattr(weights, "__file__", str(tmp_path / "bundle" / "lightcl" / "networks" / "weights.py"))
    monkeypatch.setattr(importlib.metadata, "distribution", lambda _: Distribution(tmp_path / "site-packages", None))
    expected = place(tmp_path / "site-packages")
    assert find_builtin() == expected


def test_builtin_weights_are_found_in_an_editable_checkout(tmp_path, monkeypatch):
    checkout = tmp_path / "a checkout"
    monkeypatch.setattr(weights, "__file__", str(tmp_path / "bundle" / "lightcl" / "networks" / "weights.py"))
    monkeypatch.setattr(
        importlib.metadata, "distribution", lambda _: Distribution(tmp_path / "site-packages", checkout.as_uri())
    )
    expected = place(checkout)
    assert find_builtin() == expected


def test_missing_builtin_weights_are_an_error(tmp_path, monkeypatch):
    def not_installed(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(weights, "__file__", str(tmp_path / "weights.py"))
    monkeypatch.setattr(importlib.metadata, "distribution", not_installed)
    with pytest.raises(RequestError, match=rf"built-in weights .* were not found \(looked in .*{weights.BUILTIN}"):
        find_builtin()
