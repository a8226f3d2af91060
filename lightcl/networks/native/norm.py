"""Batch-norm, shortcut and ReLU by norm.c."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lightcl.networks.native.calls import call, norm_scratch
from lightcl.networks.native.library import require_library
from lightcl.networks.native.maps import as_maps, new_maps
from lightcl.networks.split import Split, normalized_apart

LANES = 16
"""Numbers in the longest vectors. Several positions make a row where the channels of one don't fill them."""
OWN, MOVES = 1, 2
"""How norm.c treats a part of the samples: by the part's own statistics; and the running ones follow."""


class NativeBatchNorm2d(nn.BatchNorm2d):
    """A batch-norm that computes by norm.c on the CPU, in fp32 or bf16. Parameters and state dict are those of
    `nn.BatchNorm2d`."""

    split: Split | None = None

    def forward(self, input: Tensor) -> Tensor:
        """`[N, C, H, W]` -> the same, channels-last."""
        return self._normalized(input, None, relu=False) if self.applies(input) else self._by_pytorch(input)

    def followed(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """ReLU(norm(x) + shortcut), where it `applies`."""
        return self._normalized(x, shortcut, relu=True)

    def applies(self, x: Tensor) -> bool:
        """Whether norm.c computes this input."""
        return (
            x.device.type == "cpu"
            and x.numel() > 0
            and x.dtype in (torch.float32, torch.bfloat16)
            and self.momentum is not None
            and self.weight is not None
            and self.weight.dtype == torch.float32
            and self.running_mean is not None
        )

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """What it does in evaluation mode, as a factor and an addend for every channel, `[C]`."""
        assert self.running_mean is not None
        assert self.running_var is not None
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return scale, self.bias - self.running_mean * scale

    def _by_pytorch(self, x: Tensor) -> Tensor:
        whole = super().forward
        return whole(x) if self.split is None else normalized_apart(self, whole, self.split, x)

    def _normalized(self, x: Tensor, shortcut: Tensor | None, *, relu: bool) -> Tensor:
        samples, _, height, width = x.shape
        count, first, others = samples, OWN | MOVES if self.training else 0, 0
        if self.split is not None:
            count, others = self.split.count, OWN if self.split.own else 0
        if (first and count * height * width == 1) or (others and (samples - count) * height * width == 1):
            raise ValueError(f"batch-norm needs more than one value per channel in training, not {tuple(x.shape)}")
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        y: Tensor = _Norm.apply(x, shortcut, self.weight, self.bias, self, (count, relu, first, others))
        return y


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shortcut: Tensor | None, weight: Tensor, bias: Tensor, norm: NativeBatchNorm2d,
        how: tuple[int, bool, int, int],
    ) -> Tensor:  # fmt: skip
        maps = as_maps(x, x.dtype)
        added = None if shortcut is None else as_maps(shortcut, x.dtype)
        count, relu, *modes = how
        samples, channels, height, width = maps.shape
        per_row = math.gcd(height * width, LANES // math.gcd(channels, LANES))
        rows = height * width // per_row
        half = x.dtype == torch.bfloat16
        sizes = (samples * rows, count * rows, per_row * channels, channels, int(half), int(relu), *modes)
        y, statistics = new_maps(maps, channels), torch.empty(4, channels, dtype=torch.float32)
        call(
            require_library().code, "norm_forward", sizes, norm.eps, norm.momentum, maps, added, weight, bias,
            norm.running_mean, norm.running_var, y, statistics, norm_scratch(*sizes[:3]),
        )  # fmt: skip
        ctx.sizes = sizes
        ctx.save_for_backward(x, weight, statistics, *([y] if relu else []))
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, statistics, *ys = ctx.saved_tensors
        maps, gradient, y = as_maps(x, x.dtype), as_maps(gradients[0], x.dtype), ys[0] if ys else None
        of_x, of_weight, of_bias = new_maps(maps, maps.shape[1]), torch.empty_like(weight), torch.empty_like(weight)
        of_shortcut = new_maps(maps, maps.shape[1]) if ctx.needs_input_grad[1] else None
        call(
            require_library().code, "norm_backward", ctx.sizes, maps, y, gradient, weight, statistics, of_x,
            of_shortcut, of_weight, of_bias, norm_scratch(*ctx.sizes[:3]),
        )  # fmt: skip
        return of_x, of_shortcut, of_weight, of_bias, None, None
