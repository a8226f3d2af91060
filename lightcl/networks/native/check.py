"""The test of a library after it was compiled or loaded: every function once, on tiny maps, against PyTorch."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from lightcl.networks.native.calls import Pass, call, norm_scratch, winograd_scratch

ERROR, HALF_ERROR = 5e-5, 1e-2
"""Of the largest value; measured is a tenth of the first in fp32."""


def check(code: ctypes.CDLL) -> None:
    """Raises OSError for a library that computes wrongly."""
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        parts = *_convolution(code, 1), *_convolution(code, 2), *_norm(code), *_drift(code), *_im2col(code)
        for computed, exact in parts:
            bound = ERROR if computed.dtype == torch.float32 else HALF_ERROR
            if not (computed.float() - exact).abs().max() <= bound * exact.abs().max():
                raise OSError("what it computes is wrong")


def _drawn(seed: int, *shape: int) -> Tensor:
    """Numbers around 0, channels-last."""
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    return drawn.contiguous(memory_format=torch.channels_last)


def _convolution(code: ctypes.CDLL, stride: int) -> Iterator[tuple[Tensor, Tensor]]:
    side = 8 // stride
    maps, weights, gradient = _drawn(0, 2, 3, 8, 8), _drawn(1, 5, 3, 3, 3), _drawn(2, 2, 5, side, side)
    with torch.enable_grad():
        x, factors = maps.clone().requires_grad_(), weights.clone().requires_grad_()
        exact = torch.conv2d(x, factors, stride=stride, padding=1)
        of_x, of_factors = torch.autograd.grad(exact, (x, factors), gradient)
    exact = exact.detach()
    for kind in (torch.float32, torch.bfloat16):
        sizes, given = (2, 8, 8, 3, 5, int(kind == torch.bfloat16), stride), maps.to(kind)
        of_maps, of_weights, result = (torch.empty_like(like) for like in (given, weights, gradient.to(kind)))
        scratch = winograd_scratch(code, sizes, Pass.OF_MAPS)
        call(code, "winograd_backward", sizes, given, weights, gradient.to(kind), of_maps, of_weights, *scratch)
        yield of_maps, of_x
        yield of_weights.to(kind), of_factors
        scratch = winograd_scratch(code, sizes, Pass.OF_WEIGHTS)
        call(code, "winograd_backward", sizes, given, weights, gradient.to(kind), None, of_weights, *scratch)
        yield of_weights.to(kind), of_factors
        scratch = winograd_scratch(code, sizes, Pass.FORWARD)
        call(code, "winograd_forward", sizes, 0, given, weights, None, None, None, result, *scratch)
        yield result.clone(), exact
        scale, shift, shortcut = _drawn(3, 5, 1, 1, 1), _drawn(4, 5, 1, 1, 1), result.clone()
        call(code, "winograd_forward", sizes, 1, given, weights, scale, shift, shortcut, result, *scratch)
        yield result, F.relu(exact * scale.view(1, 5, 1, 1) + shift.view(1, 5, 1, 1) + exact)


def _norm(code: ctypes.CDLL) -> Iterator[tuple[Tensor, Tensor]]:
    """Two samples with statistics of their own, and one with the running ones, which the first have moved."""
    maps, shortcut, gradient = _drawn(5, 3, 5, 4, 4), _drawn(6, 3, 5, 4, 4), _drawn(7, 3, 5, 4, 4)
    weight, bias, mean, variance = _drawn(8, 4, 5, 1, 1).abs().view(4, 5)
    moved = mean.clone(), variance.clone()
    with torch.enable_grad():
        x, added = maps.clone().requires_grad_(), shortcut.clone().requires_grad_()
        factors = weight.clone().requires_grad_(), bias.clone().requires_grad_()
        first = F.batch_norm(x[:2], *moved, *factors, training=True, momentum=0.1, eps=1e-5)
        last = F.batch_norm(x[2:], moved[0].clone(), moved[1].clone(), *factors, eps=1e-5)
        exact = F.relu(torch.cat([first, last]) + added)
        wanted = torch.autograd.grad(exact, (x, added, *factors), gradient)
    for kind in (torch.float32, torch.bfloat16):
        sizes = (48, 32, 5, 5, int(kind == torch.bfloat16), 1, 3, 0)
        given, statistics, scratch = maps.to(kind), torch.empty(20), norm_scratch(48, 32, 5)
        running, y = (mean.clone(), variance.clone()), torch.empty_like(given)
        call(
            code, "norm_forward", sizes, 1e-5, 0.1, given, shortcut.to(kind), weight, bias, *running, y, statistics,
            scratch,
        )  # fmt: skip
        yield y, exact.detach()
        yield from ((one.to(kind), other) for one, other in zip(running, moved, strict=True))
        of_x, of_shortcut, of_weight, of_bias = (torch.empty_like(like) for like in (given, given, weight, bias))
        call(
            code, "norm_backward", sizes, given, y, gradient.to(kind), weight, statistics, of_x, of_shortcut, of_weight,
            of_bias, scratch,
        )  # fmt: skip
        yield from zip((of_x, of_shortcut, of_weight.to(kind), of_bias.to(kind)), wanted, strict=True)


def _drift(code: ctypes.CDLL) -> Iterator[tuple[Tensor, Tensor]]:
    maps, vital, factor = _drawn(9, 3, 5, 4, 4), torch.tensor([1, 4]), torch.tensor(0.5)
    exact = torch.zeros_like(maps)
    exact[1:, vital] = maps[1:, vital]
    for kind in (torch.float32, torch.bfloat16):
        sizes, given = (3, 16, 5, 1, 2, int(kind == torch.bfloat16)), maps.to(kind)
        difference, total, of_maps = torch.empty(2, 2, 4, 4), torch.empty(()), torch.empty_like(given)
        call(code, "drift_forward", sizes, given, vital, torch.zeros(2, 2, 4, 4), difference, total)
        yield total.to(kind), exact.square().sum()
        call(code, "drift_backward", sizes, difference, vital, factor, of_maps)
        yield of_maps, exact


def _im2col(code: ctypes.CDLL) -> Iterator[tuple[Tensor, Tensor]]:
    maps = _drawn(10, 2, 5, 4, 6).bfloat16()
    for stride, outputs in ((1, 24), (2, 6)):
        sizes = 2, 4, 6, 5, stride
        rows, summed = torch.empty(2, outputs, 9, 5, dtype=torch.bfloat16), torch.empty_like(maps)
        call(code, "im2col", sizes, maps, rows)
        exact = F.unfold(maps.float(), 3, padding=1, stride=stride)  # [N, C·9, outputs]
        yield rows, exact.view(2, 5, 9, outputs).permute(0, 3, 2, 1)
        call(code, "col2im", sizes, rows, summed)
        yield summed, F.fold(exact, (4, 6), 3, padding=1, stride=stride)
    columns = torch.empty(5, 48, dtype=torch.bfloat16)
    call(code, "transposed", (48, 5), maps, columns)
    yield columns, maps.permute(0, 2, 3, 1).reshape(48, 5).t().float()
