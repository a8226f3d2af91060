"""What both tests of Winograd's algorithm compare with: maps, the exact convolution, and one by hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightcl.networks.native import NativeConv3x3, use_native_

BOUND = 5e-5
"""Of the largest value; the algorithm loses about one decimal digit to the direct convolution."""


def maps(*shape: int, seed: int = 0) -> Tensor:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return drawn.contiguous(memory_format=torch.channels_last).requires_grad_()


def native_convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    torch.manual_seed(3)
    made = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False).to(memory_format=torch.channels_last)
    use_native_(nn.Sequential(made))
    assert isinstance(made, NativeConv3x3)
    return made


def distance(given: Tensor, expected: Tensor) -> float:
    return float(((given - expected).abs().max() / expected.abs().max()).detach())


def results(fast: nn.Conv2d, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, and the gradients of inputs and weights for fixed gradients of the outputs."""
    y = fast(x)
    return y, *torch.autograd.grad(y, (x, fast.weight), maps(*y.shape, seed=1).to(y.dtype))


def check_against_the_exact_convolution(fast: nn.Conv2d, x: Tensor) -> None:
    given = results(fast, x)
    exact_x, exact_w = x.detach().double().requires_grad_(), fast.weight.detach().double().requires_grad_()
    exact = F.conv2d(exact_x, exact_w, stride=fast.stride, padding=1)
    expected = exact, *torch.autograd.grad(exact, (exact_x, exact_w), maps(*exact.shape, seed=1).double())
    for one, other in zip(given, expected, strict=True):
        assert distance(one, other) < BOUND
    assert given[0].is_contiguous(memory_format=torch.channels_last)
    assert given[2].stride() == fast.weight.stride()


def check_a_shift_by_hand(shift: nn.Conv2d) -> None:
    """A single weight of 2 to the left of the center moves the map one to the right, doubled; with stride 2 every other
    row and column is left of it."""
    with torch.no_grad():
        shift.weight.zero_()
        shift.weight[0, 0, 1, 0] = 2.0
    if shift.stride == (1, 1):
        rows = torch.arange(16.0).view(1, 1, 4, 4)
        expected = [[0, 0, 2, 4], [0, 8, 10, 12], [0, 16, 18, 20], [0, 24, 26, 28]]
    else:
        rows = torch.arange(64.0).view(1, 1, 8, 8)
        expected = [[0, 2, 6, 10], [0, 34, 38, 42], [0, 66, 70, 74], [0, 98, 102, 106]]
    assert torch.allclose(shift(rows)[0, 0], torch.tensor(expected, dtype=torch.float32), atol=1e-4)
