"""Convolutions by Winograd's algorithm: against the direct ones, and by hand."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightcl.networks import winograd
from lightcl.networks.winograd import WinogradConv2d, use_winograd_
from tests.lightcl import toys
from tests.lightcl.networks.exact import check_a_shift_by_hand, check_against_the_exact_convolution, maps


@pytest.fixture(autouse=True)
def few_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WinogradConv2d, "fewest_channels", {1: 1})


def convolution(inputs: int, outputs: int) -> nn.Conv2d:
    torch.manual_seed(3)
    made = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False).to(memory_format=torch.channels_last)
    assert use_winograd_(nn.Sequential(made)) == 1
    assert isinstance(made, WinogradConv2d)
    return made


@pytest.mark.parametrize(("shape", "outputs"), [((3, 5, 4, 4), 7), ((2, 3, 8, 12), 40), ((47, 160, 4, 4), 160)])
@pytest.mark.parametrize("block", [winograd.BLOCK, 1])
def test_it_computes_the_convolution_and_its_gradients(shape, outputs, block, monkeypatch):
    monkeypatch.setattr(winograd, "BLOCK", block)  # 1: blocks of 16 output channels
    check_against_the_exact_convolution(convolution(shape[1], outputs), maps(*shape))


def test_a_shift_by_hand():
    check_a_shift_by_hand(convolution(1, 1))


@pytest.mark.parametrize("shape", [(2, 5, 6, 8), (2, 5, 2, 2), (2, 5, 20, 16)])
def test_other_sides_are_computed_directly(shape):
    fast, x = convolution(5, 7), maps(*shape)
    assert torch.equal(fast(x), F.conv2d(x, fast.weight, padding=1))


def test_few_channels_and_large_maps_are_not_worth_it(monkeypatch):
    monkeypatch.setattr(WinogradConv2d, "fewest_channels", {1: 5})
    assert use_winograd_(nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, bias=False))) == 0
    assert use_winograd_(nn.Sequential(nn.Conv2d(8, 4, 3, padding=1, bias=False))) == 0
    assert use_winograd_(nn.Sequential(nn.Conv2d(5, 5, 3, padding=1, bias=False))) == 1
    assert [WinogradConv2d.tiles(*size) for size in ((4, 4), (8, 12), (16, 16), (16, 20), (6, 8))] == [1, 6, 16, 0, 0]


def test_under_autocast_it_is_pytorchs_convolution():
    fast, x = convolution(5, 7), maps(2, 5, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fast(x), F.conv2d(x, fast.weight, padding=1))


def test_what_it_cannot_compute_stays_as_it_is():
    network = toys.network(freeze="layer3")
    before, copied = toys.copy_of(network.state_dict()), copy.deepcopy(network)
    assert use_winograd_(network.suffix) == 3  # not the first, whose stride is 2, nor the shortcut's
    assert [type(m) is WinogradConv2d for m in network.suffix.modules() if isinstance(m, nn.Conv2d)].count(True) == 3
    assert not any(isinstance(module, WinogradConv2d) for module in network.prefix.modules())
    assert use_winograd_(network.suffix) == 0  # they are already
    toys.assert_same(network.state_dict(), before)
    images = toys.images(4, size=32)
    assert torch.allclose(network.eval()(images), copied.eval()(images), rtol=1e-3, atol=1e-4)
    assert isinstance(copy.deepcopy(network).get_submodule("layer4.1.conv2"), WinogradConv2d)
