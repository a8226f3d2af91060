"""The batches of an epoch: shuffled, augmented, seeded."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lightcl.data.augment import Augmentation, View, augmented
from lightcl.data.tasks import Batch, Samples
from lightcl.seeds import torch_generator


def training_batches(
    samples: Samples,
    size: int,
    seed: int,
    *,
    augmentation: Augmentation,
    padding: int,
    device: torch.device,
    view: View | None = None,
) -> Iterator[Batch]:
    """One epoch of shuffled batches, of newly augmented images or of their `view`.

    A last batch of a single sample is dropped: batch-norm has no variance over one value per channel.
    """
    generator = torch_generator(seed, "batches")
    order = torch.randperm(len(samples), generator=generator).numpy()
    for start in range(0, len(order), size):
        members = order[start : start + size]
        if len(members) < 2:
            return
        if view is not None:
            yield viewed(samples.only(members), view, torch.from_numpy(members)).to(device)
            continue
        if augmentation == "none":  # the source's own images, which a cache may have
            chosen = samples.only(members)
            yield Batch(chosen.images, chosen.targets, torch.from_numpy(members), chosen).to(device)
            continue
        batch = samples.load(members)
        images = augmented(batch.images, generator, augmentation, padding)
        yield Batch(images.to(device), batch.labels.to(device), torch.from_numpy(members))


def viewed(samples: Samples, view: View, members: Tensor | None = None) -> Batch:
    """A view of all samples; the images are read on demand."""
    return Batch(lambda: view.of(samples.images(), samples.indices), samples.targets, members, samples, view)
