"""3x3 convolutions by winograd.c or, where the processor multiplies entire matrices in bf16, as such products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightcl.networks.convolution import by_product, outputs
from lightcl.networks.native.calls import Pass, call, winograd_scratch
from lightcl.networks.native.library import has_amx, require_library
from lightcl.networks.native.maps import as_maps, map_type, new_maps
from lightcl.networks.native.products import convolved
from lightcl.networks.winograd import REACH, TILE, WinogradConv2d

CHANNELS, POSITIONS = {1: 32, 2: 64}, {1: 1024, 2: 256}
"""The fewest channels and the largest input maps, by stride. With 20 channels a direct convolution is as fast: 12 of
32 numbers in two vectors would be unused. With stride 2 it is as fast with 40 channels, or on maps of 32x32.
winograd.c has room for 1024 positions."""
HALF_POSITIONS = 256
"""The largest maps in bf16: of larger ones PyTorch's convolutions are faster where the processor multiplies in bf16."""
GROUP = 128
"""Tiles of large maps that winograd.c computes together."""
ALONE = 2
"""So many threads transform a group's maps each for itself; more share that work."""


class NativeConv3x3(WinogradConv2d):
    """A 3x3 convolution in C on the CPU: by Winograd's algorithm where that applies, or as a product of patches.

    Winograd's applies to maps whose outputs' sides are multiples of 4 and which are not large. Inside autocast to bf16
    it computes in fp32 as well, and its result is rounded: that is faster than multiplying in bf16 with vectors, and
    more exact. A processor that multiplies entire matrices in bf16 does that with patches of small maps, and computes
    large ones directly.
    """

    fewest_channels, largest_map = CHANNELS, POSITIONS

    def forward(self, input: Tensor) -> Tensor:
        """`[N, C, H, W]` -> `[N, C', H', W']`, channels-last."""
        if self.multiplies(input):
            weight = self._rounded(self.weight) if torch.is_grad_enabled() else self.weight.bfloat16()
            return convolved(input.bfloat16(), weight, self.stride[0])
        return super().forward(input)

    def applies(self, input: Tensor) -> bool:
        """Whether winograd.c computes this input."""
        kind, (height, width) = map_type(), input.shape[-2:]
        return (
            bool(self.tiles(height, width, self.stride[0]))
            and (kind == torch.float32 or suits_half(height * width))
            and self._reads(input, kind)
        )

    def multiplies(self, input: Tensor) -> bool:
        """Whether this input's convolution is a product of patches and weights, also where nothing is trained: a method
        that holds a map to its recorded value would see a difference in rounding."""
        return (
            map_type() == torch.bfloat16
            and multiplies_half(outputs(input, self.stride[0]), self.stride[0])
            and self._reads(input, torch.bfloat16)
        )

    def _reads(self, input: Tensor, kind: torch.dtype) -> bool:
        """Whether C can read the weights, and this input as maps of that type."""
        return (
            input.numel() > 0
            and input.device.type == "cpu"
            and input.dtype in (torch.float32, kind)
            and self.weight.dtype == torch.float32
        )

    def computed(self, input: Tensor) -> Tensor:
        """The convolution of an input to which it `applies`."""
        result: Tensor = _Winograd.apply(input, self.weight, self.stride[0], map_type())
        return result

    def followed(self, x: Tensor, scale: Tensor, shift: Tensor, shortcut: Tensor | None) -> Tensor:
        """ReLU(scale · convolution + shift + shortcut), without a graph, where it `applies`; scale and shift are `[C']`
        in fp32."""
        kind = map_type()
        added = None if shortcut is None else as_maps(shortcut, kind)
        return _forward(as_maps(x, kind), as_maps(self.weight, torch.float32), self.stride[0], 1, scale, shift, added)


def suits_half(positions: int) -> bool:
    """Whether winograd.c computes input maps of so many positions in bf16."""
    return positions <= HALF_POSITIONS and not has_amx()


def multiplies_half(positions: int, stride: int) -> bool:
    """Whether maps of so many outputs are computed in bf16 as products of patches and weights."""
    return has_amx() and by_product(positions, stride)


def scratch_size(
    samples: int, tiles: int, inputs: int, outputs: int, *, stride: int = 1, of: Pass, threads: int = 1
) -> tuple[int, int]:
    """Numbers of scratch memory of a pass, for maps of `tiles` each and so many channels: of each thread, and of all
    together beside that.

    It is winograd.c's own count (`plan_of` there) for AVX-512; processors with shorter vectors take less.
    """

    def apart(numbers: int) -> int:
        return ((numbers + 15) // 16 | 1) * 16

    def places(rows: int) -> int:
        one, four, all_ = apart(rows), apart(TILE * rows), apart(TILE * TILE * rows)
        return 25 * one + 10 * four + all_ if stride == 2 else REACH * REACH * one

    width, high = 32, 24
    together = min(samples, max(1, GROUP // tiles))
    aside = of is Pass.FORWARD and samples * tiles >= GROUP // 2 * threads
    if aside:
        together = min(together, -(-samples // threads))
    rows = together * tiles
    whole = places(rows * (-(-(outputs if of is Pass.OF_MAPS else inputs) // 16) * 16))
    weights = {
        Pass.FORWARD: (REACH + 9) * apart(inputs * width),
        Pass.OF_WEIGHTS: 0,
        Pass.OF_MAPS: REACH * apart(outputs * width),
    }
    products = 0 if of is Pass.FORWARD else REACH * REACH * (high * width + 16)
    task = places(rows * width) + max(weights[of], products)
    return (whole + task, 0) if aside or threads <= ALONE else (task, whole)


class _Winograd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int, kind: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.kind = stride, kind
        return _forward(as_maps(x, kind), as_maps(weight, torch.float32), stride)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, *_ = ctx.needs_input_grad
        maps, weights = as_maps(x, ctx.kind), as_maps(weight, torch.float32)
        # Not views: autograd adds the gradients of several passes to the first one, where nothing else refers to it.
        of_x = new_maps(maps, maps.shape[1]) if for_x else None
        of_weight = new_maps(weights, weights.shape[1]) if for_weight else None
        sizes, code = _sizes(maps, weights, ctx.stride), require_library().code
        gradient = as_maps(gradients[0], ctx.kind)
        scratch = winograd_scratch(code, sizes, Pass.OF_MAPS if for_x else Pass.OF_WEIGHTS)
        call(code, "winograd_backward", sizes, maps, weights, gradient, of_x, of_weight, *scratch)
        return None if of_x is None else of_x.to(x.dtype), of_weight, None, None


def _forward(
    maps: Tensor, weights: Tensor, stride: int, relu: int = 0, scale: Tensor | None = None, shift: Tensor | None = None,
    shortcut: Tensor | None = None,
) -> Tensor:  # fmt: skip
    sizes, code = _sizes(maps, weights, stride), require_library().code
    result, scratch = new_maps(maps, len(weights), stride), winograd_scratch(code, sizes, Pass.FORWARD)
    call(code, "winograd_forward", sizes, relu, maps, weights, scale, shift, shortcut, result, *scratch)
    return result


def _sizes(maps: Tensor, weights: Tensor, stride: int) -> tuple[int, ...]:
    n, c, h, w = maps.shape
    return n, h, w, c, len(weights), int(maps.dtype == torch.bfloat16), stride
