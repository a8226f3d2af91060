"""3x3 convolutions in bf16 as products of entire matrices: the inputs of every output, gathered by im2col.c, by the
weights. For processors that have instructions for such products (AMX)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightcl.networks.convolution import as_rows, outputs
from lightcl.networks.native.calls import call
from lightcl.networks.native.library import require_library
from lightcl.networks.native.maps import as_maps, new_maps


def convolved(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """The convolution, with padding 1, of maps `[N, C, H, W]` by weights `[C', C, 3, 3]`, both bf16:
    `[N, C', H', W']`, channels-last."""
    result: Tensor = _Product.apply(x, weight, stride)
    return result


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride = stride
        maps = as_maps(x, torch.bfloat16)
        height, width = ((side - 1) // stride + 1 for side in maps.shape[2:])
        product = torch.mm(im2col(maps, stride), _flat(weight).t())
        return product.view(len(maps), height, width, -1).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        maps, arriving = as_maps(x, torch.bfloat16), as_maps(gradients[0], torch.bfloat16)
        rows = as_rows(arriving)
        for_x, for_weight, _ = ctx.needs_input_grad
        of_x = of_weight = None
        if for_x:
            of_x = new_maps(maps, maps.shape[1])
            col2im(torch.mm(rows, _flat(weight)), of_x, ctx.stride)
        if for_weight:
            product = torch.mm(transposed(rows), im2col(maps, ctx.stride))
            of_weight = product.view(len(weight), 3, 3, -1).permute(0, 3, 1, 2)
        return of_x, of_weight, None


def im2col(maps: Tensor, stride: int) -> Tensor:
    """The inputs of every output of a 3x3 convolution with padding 1, zeros beyond the map: bf16 maps `[N, C, H, W]`,
    channels-last, to `[N·H'·W', 9·C]`."""
    n, channels, height, width = maps.shape
    result = torch.empty(n * outputs(maps, stride), 9 * channels, dtype=torch.bfloat16)
    call(require_library().code, "im2col", (n, height, width, channels, stride), maps, result)
    return result


def col2im(rows: Tensor, maps: Tensor, stride: int) -> None:
    """The transposed of `im2col`: writes to each place of `maps` the sum of the numbers of `rows` that belong to it,
    computed in fp32."""
    n, channels, height, width = maps.shape
    call(require_library().code, "col2im", (n, height, width, channels, stride), rows, maps)


def transposed(rows: Tensor) -> Tensor:
    """A bf16 matrix `[R, C]`, transposed in memory: a product along the R is then a fifth faster."""
    result = torch.empty(rows.shape[::-1], dtype=torch.bfloat16)
    call(require_library().code, "transposed", tuple(rows.shape), rows, result)
    return result


def _flat(weight: Tensor) -> Tensor:
    """Weights `[C', C, 3, 3]` as `[C', 9·C]`: a view where they are channels-last."""
    return weight.permute(0, 2, 3, 1).reshape(len(weight), -1)
