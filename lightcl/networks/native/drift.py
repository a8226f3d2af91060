"""The squared drift of vital channels by drift.c."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightcl.networks.layout import Layout
from lightcl.networks.native.calls import call
from lightcl.networks.native.library import require_library


class NativeSquaredDrift(torch.autograd.Function):
    """Σ (F[first:, vital] - F*)² of one map `[N, C, H, W]`, channels-last, in fp32 or bf16 on the CPU; fp32.

    `vital` are the V channels' indices, and F* `[N - first, V, H, W]` is in fp32.
    """

    @staticmethod
    def forward(ctx: Any, feature_map: Tensor, vital: Tensor, then: Tensor, first: int) -> Tensor:
        samples, channels, height, width = feature_map.shape
        half = feature_map.dtype == torch.bfloat16
        ctx.sizes = samples, height * width, channels, first, len(vital), int(half)
        then = then.contiguous()
        difference, total = torch.empty_like(then), torch.empty((), dtype=torch.float32)
        call(require_library().code, "drift_forward", ctx.sizes, feature_map, vital, then, difference, total)
        ctx.save_for_backward(difference, vital)
        ctx.layout = Layout.of(feature_map)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        difference, vital = ctx.saved_tensors
        of_map: Tensor = ctx.layout.empty(difference.device)
        call(require_library().code, "drift_backward", ctx.sizes, difference, vital, gradients[0], of_map)
        return of_map, None, None, None
