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

from lightcl.networks.convolution import Conv3x3, RoundedWeight

TILE, REACH = 4, 6
"""Outputs and inputs of a tile along one side."""
CHANNELS, POSITIONS = 64, 256
"""The fewest channels and the largest maps: with fewer channels, rearranging costs more than multiplying saves, and on
larger maps so does cutting them into tiles. Measured with 20 to 512 channels and maps of 4x4 to 32x32."""
BLOCK = 2**20
"""Transformed weights in numbers: as many may exist together; where there are more, a quarter of it at a time."""

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


class WinogradConv2d(Conv3x3):
    """A convolution that computes by Winograd's algorithm where it applies, and as `Conv3x3` does where it does not.

    It applies to fp32 maps on the CPU whose sides are multiples of 4 and which are not large, outside autocast. Weights
    and state dict are those of `nn.Conv2d`.
    """

    fewest_channels, largest_map = {1: CHANNELS}, {1: POSITIONS}
    """By stride."""

    def forward(self, input: Tensor) -> Tensor:
        """`[N, C, H, W]` -> `[N, C', H, W]`, channels-last."""
        return self.computed(input) if self.applies(input) else super().forward(input)

    def applies(self, input: Tensor) -> bool:
        """Whether Winograd's algorithm computes this input."""
        height, width = input.shape[-2:]
        return (
            bool(self.tiles(height, width, self.stride[0]))
            and input.numel() > 0
            and input.dtype == torch.float32
            and input.device.type == "cpu"
            and not torch.is_autocast_enabled("cpu")
        )

    def computed(self, input: Tensor) -> Tensor:
        """The convolution of an input to which the algorithm applies."""
        result: Tensor = _Winograd.apply(input, self.weight)
        return result

    @classmethod
    def tiles(cls, height: int, width: int, stride: int = 1) -> int:
        """Tiles of an input map; 0: it is not computed by Winograd's algorithm."""
        side = TILE * stride
        fits = height % side == width % side == 0 and height * width <= cls.largest_map[stride]
        return height // side * (width // side) if fits else 0

    @classmethod
    def suits(cls, convolution: nn.Conv2d) -> bool:
        """Whether Winograd's algorithm can compute it and is worth it, on maps that have tiles."""
        return (
            convolution.stride in [(stride, stride) for stride in cls.fewest_channels]
            and min(convolution.in_channels, convolution.out_channels) >= cls.fewest_channels[convolution.stride[0]]
            and convolution.kernel_size == (3, 3)
            and convolution.padding == (1, 1)
            and convolution.dilation == (1, 1)
            and convolution.groups == 1
            and convolution.bias is None
            and convolution.padding_mode == "zeros"
        )


def use_winograd_(stage: nn.Module, kind: type[WinogradConv2d] = WinogradConv2d) -> int:
    """Makes every convolution of `stage` that Winograd's algorithm can compute one of that kind; returns how many.

    Those are 3x3 with padding 1 and a stride that `kind` knows, of many channels, without groups, dilation or bias.
    """
    convolutions = [module for module in stage.modules() if isinstance(module, nn.Conv2d)]
    found = [module for module in convolutions if type(module) in (nn.Conv2d, Conv3x3) and kind.suits(module)]
    for module in found:
        module.__class__ = kind  # the parameters stay the same objects
        vars(module)["_rounded"] = RoundedWeight()
    return len(found)


@cache
def _transform(kind: str, places: range, transposed: bool) -> Tensor:
    """The rows `places` of the Kronecker product of a transform with itself.

    Of the input `[36, 36]`, or `[36, 16]` for a map that is one tile, whose border is zero; of the weights `[36, 9]`;
    of the output's transposed `[36, 16]`.
    """
    table = {"input": INPUT, "tile": INPUT, "weights": WEIGHTS, "output": tuple(zip(*OUTPUT, strict=True))}[kind]
    matrix = torch.tensor(table, dtype=torch.float64)
    product = torch.kron(matrix, matrix)
    if kind == "tile":
        product = product.view(-1, REACH, REACH)[:, 1:-1, 1:-1].reshape(-1, TILE * TILE)
    product = product[places.start : places.stop]
    return (product.T if transposed else product).float().contiguous()


def _cut(x: Tensor) -> tuple[str, Tensor]:
    """Maps `[N, C, H, W]` as overlapping tiles `[N·tiles, 36, C]`, and the name of their transform; a map of one tile
    as it is, `[N, 16, C]`."""
    n, channels, height, width = x.shape
    if height == width == TILE:
        return "tile", x.permute(0, 2, 3, 1).reshape(n, TILE * TILE, channels)
    padded = x.new_zeros(n, height + 2, width + 2, channels)
    padded[:, 1:-1, 1:-1] = x.permute(0, 2, 3, 1)
    tiles = padded.unfold(1, REACH, TILE).unfold(2, REACH, TILE)  # [N, rows, columns, C, 6, 6]
    return "input", tiles.permute(0, 1, 2, 4, 5, 3).reshape(-1, REACH * REACH, channels)


def _uncut(tiles: Tensor, shape: torch.Size) -> Tensor:
    """The transposed of `_cut`: overlapping tiles are added up to maps `[N, C, H, W]`, channels-last."""
    n, channels, height, width = shape
    if height == width == TILE:
        return tiles.view(n, TILE, TILE, channels).permute(0, 3, 1, 2)
    rows, columns = height // TILE, width // TILE
    tiles = tiles.view(n, rows, columns, REACH, REACH, channels)
    padded = tiles.new_zeros(n, height + 2, width + 2, channels)
    for row in range(rows):
        for column in range(columns):
            top, left = row * TILE, column * TILE
            padded[:, top : top + REACH, left : left + REACH] += tiles[:, row, column]
    return padded[:, 1:-1, 1:-1].permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)


def _to_tiles(maps: Tensor) -> Tensor:
    """Maps `[N, C, H, W]` cut into tiles `[N·tiles, 16, C]` without overlap."""
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
        n, _, height, width = x.shape
        (kind, cut), flat = _cut(x), _flat(weight)
        outputs = x.new_empty(len(cut), TILE * TILE, len(flat))
        for places, blocks in parts(*flat.shape[::2]):
            inputs = _at_places(kind, places, cut)
            for block in blocks:
                weights = _at_places("weights", places, flat[block])
                products = torch.bmm(inputs.permute(1, 0, 2), weights.permute(1, 2, 0))  # [places, tiles, C']
                _add_(outputs[:, :, block], _transform("output", places, True), products, places)
        return _from_tiles(outputs, n, height, width)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        for_x, for_weight = ctx.needs_input_grad
        (kind, cut), flat, outputs = _cut(x), _flat(weight), _to_tiles(gradients[0])
        of_x = of_weight = None
        if for_x:
            of_cut = torch.empty_like(cut)
            for places, blocks in parts(*flat.shape[::2]):
                of_inputs: Tensor | None = None  # [places, tiles, C]
                for block in blocks:
                    products = _at_places("output", places, outputs[:, :, block]).permute(1, 0, 2)
                    weights = _at_places("weights", places, flat[block]).permute(1, 0, 2)
                    if of_inputs is None:
                        of_inputs = torch.bmm(products, weights)
                    else:
                        of_inputs.baddbmm_(products, weights)
                assert of_inputs is not None
                _add_(of_cut, _transform(kind, places, True), of_inputs, places)
            of_x = _uncut(of_cut, x.shape)
            del of_inputs, products, weights
        if for_weight:
            of_flat = torch.empty_like(flat)
            for places, blocks in parts(*flat.shape[::2]):
                inputs = _at_places(kind, places, cut).permute(1, 0, 2)
                for block in blocks:
                    products = _at_places("output", places, outputs[:, :, block])
                    of_weights = torch.bmm(products.permute(1, 2, 0), inputs)  # [places, C', C]
                    _add_(of_flat[block], _transform("weights", places, True), of_weights, places)
            of_weight = of_flat.view(len(flat), 3, 3, -1).permute(0, 3, 1, 2)
        return of_x, of_weight


def _flat(weight: Tensor) -> Tensor:
    """Weights `[C', C, 3, 3]` as `[C', 9, C]`, which they are in memory where they lie channels-last."""
    return weight.permute(0, 2, 3, 1).reshape(len(weight), 9, -1)


def _at_places(kind: str, places: range, values: Tensor) -> Tensor:
    """A transform of `[N, k, C]`, at some places of a tile: `[N, places, C]`."""
    return torch.matmul(_transform(kind, places, False), values)


def _add_(total: Tensor, transform: Tensor, values: Tensor, places: range) -> None:
    """Adds `transform` `[k, places]` of `values` `[places, N, C]` to `total` `[N, k, C]`, whose first places set it."""
    added = values.permute(1, 0, 2)
    if places.start == 0 and total.is_contiguous():
        torch.matmul(transform, added, out=total)
    elif places.start == 0:
        total.copy_(torch.matmul(transform, added))
    else:
        total.baddbmm_(transform.expand(len(added), -1, -1), added)


def parts(outputs: int, inputs: int) -> list[tuple[range, list[slice]]]:
    """What is computed at a time: some of the 36 places of a tile, and for these blocks of output channels.

    All places for weights that are small enough when transformed, else a third of them.
    """
    if REACH * REACH * inputs * outputs <= BLOCK:
        return [(range(REACH * REACH), [slice(0, outputs)])]
    count = REACH * REACH // 3
    size = max(16, BLOCK // 4 // (count * inputs) // 16 * 16)
    blocks = [slice(start, min(start + size, outputs)) for start in range(0, outputs, size)]
    return [(range(start, start + count), blocks) for start in range(0, REACH * REACH, count)]
