"""Seeded views, one image after the other, in Python integers."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lightcl.data.augment import View
from lightcl.seeds import derive

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15


def mixed(state: int) -> int:
    """SplitMix64's output function."""
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
    return state ^ (state >> 31)


def view_one_by_one(view: View, images: Tensor, rows: np.ndarray) -> Tensor:
    """The view of uint8 images `[N, C, H, W]`."""
    results = []
    side = view.padding
    for image, row in zip(images, rows.tolist(), strict=True):
        start = mixed((row * GOLDEN + derive(view.seed, "view", view.number)) & MASK)
        top, left, coin = (mixed((start + k * GOLDEN) & MASK) >> 33 for k in (1, 2, 3))
        padded = torch.nn.functional.pad(image, (side, side, side, side))
        top, left = top % (2 * side + 1), left % (2 * side + 1)
        crop = padded[:, top : top + image.shape[1], left : left + image.shape[2]]
        results.append(crop.flip(2) if coin % 2 and view.augmentation == "crop-flip" else crop)
    return torch.stack(results)
