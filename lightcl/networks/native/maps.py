"""Maps as C reads them."""

from __future__ import annotations

import torch
from torch import Tensor


def map_type() -> torch.dtype:
    """Of maps that are computed on the CPU: bf16 inside autocast to it, else fp32."""
    half = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    return torch.bfloat16 if half else torch.float32


def as_maps(x: Tensor, kind: torch.dtype) -> Tensor:
    """Maps `[N, C, H, W]`, or weights, as C reads them: channels-last, which they are as a rule."""
    if x.dtype == kind and x.is_contiguous(memory_format=torch.channels_last):
        return x  # a step asks often, and the two operations cost more than the two questions
    return x.to(kind).contiguous(memory_format=torch.channels_last)


def new_maps(x: Tensor, channels: int, stride: int = 1) -> Tensor:
    """Maps like `x`, of so many channels and sides divided by `stride`, with any values."""
    n, _, height, width = x.shape
    shape = n, channels, height // stride, width // stride
    return torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)
