"""Random crop with padding and horizontal flip, one image after the other."""

from __future__ import annotations

import torch
from torch import Tensor


def crop_flip_one_by_one(images: Tensor, generator: torch.Generator, padding: int, flip: bool) -> Tensor:
    """uint8 `[N, H, W, C]`; draws in the order of the batched version: all tops, all lefts, all flips."""
    count, height, width, channels = images.shape
    tops = torch.randint(0, 2 * padding + 1, (count,), generator=generator).tolist()
    lefts = torch.randint(0, 2 * padding + 1, (count,), generator=generator).tolist()
    coins = torch.rand(count, generator=generator).tolist() if flip else [1.0] * count
    results = []
    for image, top, left, coin in zip(images, tops, lefts, coins, strict=True):
        padded = torch.zeros(height + 2 * padding, width + 2 * padding, channels, dtype=torch.uint8)
        padded[padding : padding + height, padding : padding + width] = image
        crop = padded[top : top + height, left : left + width]
        results.append(crop.flip(1) if coin < 0.5 else crop)
    return torch.stack(results)
