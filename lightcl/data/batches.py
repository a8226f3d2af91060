"""The batches of an epoch: shuffled, augmented, seeded."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lightcl.data.augment import Augmentation, augmented
from lightcl.data.tasks import Batch, Samples
from lightcl.seeds import torch_generator


def training_batches(
    samples: Samples, size: int, seed: int, *, augmentation: Augmentation, padding: int, device: torch.device
) -> Iterator[Batch]:
    """One epoch of shuffled, augmented batches; a last batch of a single sample is dropped.

    (Batch-norm has no variance over one value per channel.)
    """
    generator = torch_generator(seed, "batches")
    order = torch.randperm(len(samples), generator=generator).numpy()
    for start in range(0, len(order), size):
        members = order[start : start + size]
        if len(members) < 2:
            return
        batch = samples.load(members)
        images = augmented(batch.images, generator, augmentation, padding)
        yield Batch(images.to(device), batch.labels.to(device), torch.from_numpy(members))
