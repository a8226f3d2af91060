"""The paper's augmentation, for a whole batch at once: random crop with padding, random horizontal flip.

It is drawn again for every batch (`augmented`), or each image has a fixed number of seeded views (`View`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lightcl.seeds import derive

Augmentation = Literal["none", "crop", "crop-flip"]


@dataclass(frozen=True)
class View:
    """One of the seeded views of every image. It depends only on the seed, the image's row and the view's number.

    So a view is the same on every device, in every epoch and in every batch.
    """

    seed: int
    number: int
    augmentation: Augmentation
    padding: int

    def of(self, images: Tensor, rows: np.ndarray) -> Tensor:
        """The views of uint8 images `[N, C, H, W]` that are `rows` `[N]` of their source; same shape and type."""
        if self.augmentation == "none":
            return images
        # SplitMix64 (Steele, Lea, Flood, OOPSLA 2014) of row and seed: one vectorized draw for the batch, where a
        # generator per image would cost more than the training step of a small network.
        key = np.uint64(derive(self.seed, "view", self.number))
        with np.errstate(over="ignore"):
            state = _mixed(rows.astype(np.uint64) * _GOLDEN + key)
            draws = [torch.from_numpy((_mixed(state + np.uint64(k) * _GOLDEN) >> np.uint64(33)).astype(np.int64))
                     for k in (1, 2, 3)]  # fmt: skip
        choices = 2 * self.padding + 1
        flipped = draws[2] % 2 == 1 if self.augmentation == "crop-flip" else None
        return _crop_flip(
            images.permute(0, 2, 3, 1), draws[0][:, None] % choices, draws[1][:, None] % choices,
            None if flipped is None else flipped[:, None], self.padding,
        ).permute(0, 3, 1, 2)  # fmt: skip


def augmented(images: Tensor, generator: torch.Generator, kind: Augmentation, padding: int) -> Tensor:
    """Augments uint8 images `[N, C, H, W]`; the result has the same shape and type."""
    if kind == "none":
        return images
    cropped = random_crop_flip(images.permute(0, 2, 3, 1), generator, padding=padding, flip=kind == "crop-flip")
    return cropped.permute(0, 3, 1, 2)


def random_crop_flip(images: Tensor, generator: torch.Generator, padding: int = 4, flip: bool = True) -> Tensor:
    """Crops and flips each image with its own random draw.

    `images` is uint8 `[N, H, W, C]`; the result has the same shape and type. Padding is black, as in torchvision's
    RandomCrop.
    """
    n = len(images)
    top = torch.randint(0, 2 * padding + 1, (n, 1), generator=generator)
    left = torch.randint(0, 2 * padding + 1, (n, 1), generator=generator)
    flipped = torch.rand((n, 1), generator=generator) < 0.5 if flip else None
    return _crop_flip(images, top, left, flipped, padding)


def _crop_flip(images: Tensor, top: Tensor, left: Tensor, flipped: Tensor | None, padding: int) -> Tensor:
    """Crops of `[N, H, W, C]` at `top`, `left` `[N, 1]` of the padded images, mirrored where `flipped` `[N, 1]`.

    One gather per batch: a loop over images costs more than the training step of a small network.
    """
    n, height, width, channels = images.shape
    padded = images.new_zeros((n, height + 2 * padding, width + 2 * padding, channels))
    padded[:, padding : padding + height, padding : padding + width] = images
    rows = top + torch.arange(height)
    columns = torch.arange(width).expand(n, width)
    if flipped is not None:
        columns = torch.where(flipped, width - 1 - columns, columns)
    columns = left + columns
    batch = torch.arange(n)
    return padded[batch[:, None, None], rows[:, :, None], columns[:, None, :]]


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mixed(state: np.ndarray) -> np.ndarray:
    """SplitMix64's output function, elementwise over uint64."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = state ^ (state >> np.uint64(31))
    return mixed
