"""Convolutions by Winograd's algorithm: against the direct ones, and by hand."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightcl.networks import winograd
from lightcl.networks.winograd import WinogradConv2d, tiles_of, use_winograd_
from tests.lightcl import toys


@pytest.fixture(autouse=True)
def few_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "CHANNELS", 1)


BOUND = 5e-5
"""Of the largest value; the algorithm loses about one decimal digit to the direct convolution."""


def convolution(inputs: int, outputs: int) -> nn.Conv2d:
    torch.manual_seed(3)
    made = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False).to(memory_format=torch.channels_last)
    assert use_winograd_(nn.Sequential(made)) == 1
    assert isinstance(made, WinogradConv2d)
    return made


def maps(*shape: int) -> Tensor:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return drawn.contiguous(memory_format=torch.channels_last).requires_grad_()


def distance(given: Tensor, expected: Tensor) -> float:
    return float(((given - expected).abs().max() / expected.abs().max()).detach())


@pytest.mark.parametrize(("shape", "outputs"), [((3, 5, 4, 4), 7), ((2, 3, 8, 12), 40), ((47, 160, 4, 4), 160)])
@pytest.mark.parametrize("block", [winograd.BLOCK, 1])
def test_it_computes_the_convolution_and_its_gradients(shape, outputs, block, monkeypatch):
    monkeypatch.setattr(winograd, "BLOCK", block)  # 1: blocks of 16 output channels
    fast, x = convolution(shape[1], outputs), maps(*shape)
    y = fast(x)
    gradient = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    given = torch.autograd.grad(y, (x, fast.weight), gradient)
    exact_x, exact_w = x.detach().double().requires_grad_(), fast.weight.detach().double().requires_grad_()
    exact = F.conv2d(exact_x, exact_w, padding=1)
    expected = torch.autograd.grad(exact, (exact_x, exact_w), gradient.double())
    assert distance(y, exact) < BOUND
    assert distance(given[0], expected[0]) < BOUND
    assert distance(given[1], expected[1]) < BOUND
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert given[1].stride() == fast.weight.stride()


def test_a_shift_by_hand():
    """A single weight of 2 to the left of the center moves the map one to the right, doubled."""
    shift = convolution(1, 1)
    with torch.no_grad():
        shift.weight.zero_()
        shift.weight[0, 0, 1, 0] = 2.0
    rows = torch.arange(16.0).view(1, 1, 4, 4)
    expected = torch.tensor([[0, 0, 2, 4], [0, 8, 10, 12], [0, 16, 18, 20], [0, 24, 26, 28]], dtype=torch.float32)
    assert torch.allclose(shift(rows)[0, 0], expected, atol=1e-4)


@pytest.mark.parametrize("shape", [(2, 5, 6, 8), (2, 5, 2, 2), (2, 5, 20, 16)])
def test_other_sides_are_computed_directly(shape):
    fast, x = convolution(5, 7), maps(*shape)
    assert torch.equal(fast(x), F.conv2d(x, fast.weight, padding=1))


def test_few_channels_and_large_maps_are_not_worth_it(monkeypatch):
    monkeypatch.setattr(winograd, "CHANNELS", 5)
    assert use_winograd_(nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, bias=False))) == 0
    assert use_winograd_(nn.Sequential(nn.Conv2d(8, 4, 3, padding=1, bias=False))) == 0
    assert use_winograd_(nn.Sequential(nn.Conv2d(5, 5, 3, padding=1, bias=False))) == 1
    assert [tiles_of(*size) for size in ((4, 4), (8, 12), (16, 16), (16, 20), (6, 8))] == [1, 6, 16, 0, 0]


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
