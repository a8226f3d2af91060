"""The paper's augmentation, for a whole batch at once: random crop with padding, random horizontal flip."""

from typing import Literal

import torch
from torch import Tensor

Augmentation = Literal["none", "crop", "crop-flip"]


def augmented(images: Tensor, generator: torch.Generator, kind: Augmentation, padding: int) -> Tensor:
    """Augments uint8 images `[N, C, H, W]`; the result has the same shape and type."""
    if kind == "none":
        return images
    cropped = random_crop_flip(images.permute(0, 2, 3, 1), generator, padding=padding, flip=kind == "crop-flip")
    return cropped.permute(0, 3, 1, 2)


def random_crop_flip(images: Tensor, generator: torch.Generator, padding: int = 4, flip: bool = True) -> Tensor:
    """Crops and flips each image by its own draw.

    `images` is uint8 `[N, H, W, C]`; the result has the same shape and type. Padding is black, as in torchvision's
    RandomCrop. One gather per batch: a loop over images costs more than the training step of a small network.
    """
    n, height, width, channels = images.shape
    padded = images.new_zeros((n, height + 2 * padding, width + 2 * padding, channels))
    padded[:, padding : padding + height, padding : padding + width] = images
    top = torch.randint(0, 2 * padding + 1, (n, 1), generator=generator)
    left = torch.randint(0, 2 * padding + 1, (n, 1), generator=generator)
    rows = top + torch.arange(height)
    columns = torch.arange(width).expand(n, width)
    if flip:
        flipped = torch.rand((n, 1), generator=generator) < 0.5
        columns = torch.where(flipped, width - 1 - columns, columns)
    columns = left + columns
    batch = torch.arange(n)
    return padded[batch[:, None, None], rows[:, :, None], columns[:, None, :]]
