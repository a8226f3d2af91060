"""How a feature map lies in memory, for a gradient that is to lie as the map does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Shape, type and memory format of a map `[N, C, H, W]`.

    A tensor on the device "meta" says the same, but takes fifty times as long to make.
    """

    shape: torch.Size
    dtype: torch.dtype
    memory_format: torch.memory_format

    @classmethod
    def of(cls, feature_map: Tensor) -> Self:
        """Of `[N, C, H, W]`, contiguous or channels-last."""
        last = feature_map.is_contiguous(memory_format=torch.channels_last)
        return cls(feature_map.shape, feature_map.dtype, torch.channels_last if last else torch.contiguous_format)

    def empty(self, device: torch.device) -> Tensor:
        """A new map of this layout, with any values."""
        return torch.empty(self.shape, dtype=self.dtype, device=device, memory_format=self.memory_format)
