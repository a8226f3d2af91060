"""Global average pooling whose gradient lies in memory as the map does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightcl.networks.layout import Layout


def global_average(feature_map: Tensor) -> Tensor:
    """`[N, C, H, W]` -> `[N, C]`: `feature_map.mean((2, 3))`, with the same gradient to the bit.

    PyTorch's gradient is contiguous also where the map is channels-last, and the operations before it, which get
    both, are then ten times as slow.
    """
    if not (feature_map.requires_grad and torch.is_grad_enabled()):
        return feature_map.mean((2, 3))
    result: Tensor = _GlobalAverage.apply(feature_map)
    return result


class _GlobalAverage(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, feature_map: Tensor) -> Tensor:
        ctx.layout = Layout.of(feature_map)
        return feature_map.mean((2, 3))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (gradient,) = gradients
        height, width = ctx.layout.shape[2:]
        of_map: Tensor = ctx.layout.empty(gradient.device)
        return of_map.copy_((gradient / (height * width))[:, :, None, None])
