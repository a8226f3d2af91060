"""3x3 convolutions by Winograd's algorithm F(4x4, 3x3): a quarter of the multiplications, rounded differently.

Lavin, Gray: "Fast Algorithms for Convolutional Neural Networks", CVPR 2016 (arXiv 1509.09308), with the points 0, ±1,
±2 and infinity. A map is cut into tiles of 4x4 outputs, which need 6x6 inputs d, and with g the 3x3 weights of a pair
of channels

    Y = Aᵀ [ (G g Gᵀ) ⊙ (Bᵀ d B) ] A

Summed over the input channels, ⊙ is 36 matrix products, one for each place of a tile. They are 36 multiplications per
pair of channels and tile, where the direct convolution has 144. All transforms are matrix products as well, with the
Kronecker products G ⊗ G, Bᵀ ⊗ Bᵀ and Aᵀ ⊗ Aᵀ. The backward pass is the transposed of each step.

The transformed weights take four times the room of the weights, so they are made and used in blocks of output channels,
and again in the backward pass: nothing but input and weights is kept in between.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

TILE, REACH = 4, 6
"""Outputs and inputs of a tile along one side."""
BLOCK = 2**20
"""Transformed weights that exist at a time, in numbers; a block stays in a processor's cache."""

INPUT = (
    (4, 0, -5, 0, 1, 0), (0, -4, -4, 1, 1, 0), (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0), (0, 2, -1, -2, 1, 0), (0, 4, 0, -5, 0, 1),
)  # fmt: skip
"""Bᵀ"""
WEIGHTS = (
    (1 / 4, 0, 0), (-1 / 6, -1 / 6, -1 / 6), (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6), (1 / 24, -1 / 12, 1 / 6), (0, 0, 1),
)  # fmt: skip
"""G"""
OUTPUT = ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1))
"""Aᵀ"""


class WinogradConv2d(nn.Conv2d):
    """A convolution that computes by Winograd's algorithm where it applies, and as PyTorch does where it does not.

    It applies to fp32 maps on the CPU whose sides are multiples of 4, outside autocast. Weights and state dict are
    those of `nn.Conv2d`.
    """

    def forward(self, input: Tensor) -> Tensor:
        """`[N, C, H, W]` -> `[N, C', H, W]`, channels-last."""
        height, width = input.shape[-2:]
        if (
            height % TILE
            or width % TILE
            or input.dtype != torch.float32
            or input.device.type != "cpu"
            or torch.is_autocast_enabled("cpu")
        ):
            return super().forward(input)
        result: Tensor = _Winograd.apply(input, self.weight)
        return result


def use_winograd_(stage: nn.Module) -> int:
    """Makes every convolution of `stage` that Winograd's algorithm can compute a `WinogradConv2d`; returns how many.

    Those are 3x3 with stride 1 and padding 1, without groups, dilation or bias.
    """
    found = [module for module in stage.modules() if type(module) is nn.Conv2d and _suits(module)]
    for module in found:
        module.__class__ = WinogradConv2d  # the parameters stay the same objects
    return len(found)


def _suits(convolution: nn.Conv2d) -> bool:
    return (
        convolution.kernel_size == (3, 3)
        and convolution.stride == (1, 1)
        and convolution.padding == (1, 1)
        and convolution.dilation == (1, 1)
        and convolution.groups == 1
        and convolution.bias is None
        and convolution.padding_mode == "zeros"
    )


@cache
def _transform(kind: str, transposed: bool) -> Tensor:
    """The Kronecker product of a transform with itself: of the input `[36, 36]`, or `[36, 16]` for a map that is one
    tile, whose border is zero; of the weights `[36, 9]`; of the output `[16, 36]`."""
    table = {"input": INPUT, "tile": INPUT, "weights": WEIGHTS, "output": OUTPUT}[kind]
    matrix = torch.tensor(table, dtype=torch.float64)
    product = torch.kron(matrix, matrix)
    if kind == "tile":
        product = product.view(-1, REACH, REACH)[:, 1:-1, 1:-1].reshape(-1, TILE * TILE)
    return (product.T if transposed else product).float().contiguous()


def _tiles_in(x: Tensor) -> Tensor:
    """Bᵀ d B of every tile: maps `[N, C, H, W]` -> `[N·tiles, 36, C]`."""
    n, channels, height, width = x.shape
    if height == width == TILE:
        return torch.matmul(_transform("tile", False), x.permute(0, 2, 3, 1).reshape(n, TILE * TILE, channels))
    padded = x.new_zeros(n, height + 2, width + 2, channels)
    padded[:, 1:-1, 1:-1] = x.permute(0, 2, 3, 1)
    tiles = (
        padded.unfold(1, REACH, TILE).unfold(2, REACH, TILE).permute(0, 1, 2, 4, 5, 3)
    )  # [N, rows, columns, 6, 6, C]
    return torch.matmul(_transform("input", False), tiles.reshape(-1, REACH * REACH, channels))


def _tiles_in_backward(gradient: Tensor, shape: torch.Size) -> Tensor:
    """The transposed of `_tiles_in`: `[N·tiles, 36, C]` -> `[N, C, H, W]`, channels-last."""
    n, channels, height, width = shape
    if height == width == TILE:
        maps = torch.matmul(_transform("tile", True), gradient)
        return maps.view(n, TILE, TILE, channels).permute(0, 3, 1, 2)
    rows, columns = height // TILE, width // TILE
    tiles = torch.matmul(_transform("input", True), gradient).view(n, rows, columns, REACH, REACH, channels)
    padded = gradient.new_zeros(n, height + 2, width + 2, channels)
    for row in range(rows):
        for column in range(columns):
            top, left = row * TILE, column * TILE
            padded[:, top : top + REACH, left : left + REACH] += tiles[:, row, column]
    return padded[:, 1:-1, 1:-1].permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)


def _to_tiles(maps: Tensor) -> Tensor:
    """Maps `[N, C, H, W]` cut into tiles `[N·tiles, 16, C]`."""
    n, channels, height, width = maps.shape
    parts = maps.permute(0, 2, 3, 1).reshape(n, height // TILE, TILE, width // TILE, TILE, channels)
    return parts.permute(0, 1, 3, 2, 4, 5).reshape(-1, TILE * TILE, channels)


def _from_tiles(tiles: Tensor, n: int, height: int, width: int) -> Tensor:
    """The inverse of `_to_tiles`."""
    parts = tiles.view(n, height // TILE, width // TILE, TILE, TILE, tiles.shape[-1]).permute(0, 1, 3, 2, 4, 5)
    return parts.reshape(n, height, width, -1).permute(0, 3, 1, 2)


class _Winograd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        n, channels, height, width = x.shape
        inputs = _tiles_in(x).permute(1, 0, 2)  # [36, tiles, C]
        flat = _flat(weight)
        outputs = x.new_empty(inputs.shape[1], TILE * TILE, len(flat))
        for block in _blocks(len(flat), channels):
            products = torch.bmm(inputs, _weights(flat[block]).permute(1, 2, 0))  # [36, tiles, C']
            outputs[:, :, block] = torch.matmul(_transform("output", False), products.permute(1, 0, 2))
        return _from_tiles(outputs, n, height, width)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        for_x, for_weight = ctx.needs_input_grad
        flat, inputs = _flat(weight), _tiles_in(x).permute(1, 0, 2) if for_weight else None
        outputs = _to_tiles(gradients[0])
        of_inputs: Tensor | None = None  # [36, tiles, C]
        of_weight = torch.empty_like(flat) if for_weight else None  # [C', 9, C]
        for block in _blocks(*flat.shape[::2]):
            products = torch.matmul(_transform("output", True), outputs[:, :, block])  # [tiles, 36, C']
            if for_x:
                transformed = _weights(flat[block]).permute(1, 0, 2)
                if of_inputs is None:
                    of_inputs = torch.bmm(products.permute(1, 0, 2), transformed)
                else:
                    of_inputs.baddbmm_(products.permute(1, 0, 2), transformed)
            if of_weight is not None and inputs is not None:
                of_transformed = torch.bmm(products.permute(1, 2, 0), inputs)  # [36, C', C]
                torch.matmul(_transform("weights", True), of_transformed.permute(1, 0, 2), out=of_weight[block])
        of_x = None if of_inputs is None else _tiles_in_backward(of_inputs.permute(1, 0, 2), x.shape)
        if of_weight is None:
            return of_x, None
        return of_x, of_weight.view(len(flat), 3, 3, -1).permute(0, 3, 1, 2)


def _flat(weight: Tensor) -> Tensor:
    """Weights `[C', C, 3, 3]` as `[C', 9, C]`, which they are in memory where they lie channels-last."""
    return weight.permute(0, 2, 3, 1).reshape(len(weight), 9, -1)


def _weights(flat: Tensor) -> Tensor:
    """G g Gᵀ of weights `[C', 9, C]`: `[C', 36, C]`."""
    return torch.matmul(_transform("weights", False), flat)


def _blocks(outputs: int, inputs: int) -> list[slice]:
    """Blocks of output channels."""
    size = max(16, BLOCK // (REACH * REACH * inputs) // 16 * 16)
    return [slice(start, min(start + size, outputs)) for start in range(0, outputs, size)]
