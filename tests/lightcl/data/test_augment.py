"""The batched augmentation, by hand and against a loop over images with the same draws."""

import numpy as np
import pytest
import torch

from lightcl.data.augment import View, random_crop_flip
from lightcl.data.batches import training_batches
from lightcl.data.tasks import Samples
from tests.lightcl import toys
from tests.reference.augmentation import crop_flip_one_by_one
from tests.reference.views import view_one_by_one


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=seeded(0))


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("padding", [0, 1, 4, 9])
@pytest.mark.parametrize("shape", [(33, 8, 8, 3), (5, 6, 10, 1), (1, 3, 3, 3)])
def test_agrees_with_the_loop_over_images(shape, padding, flip):
    images = noise(*shape)
    for seed in range(3):
        fast = random_crop_flip(images, seeded(seed), padding=padding, flip=flip)
        assert torch.equal(fast, crop_flip_one_by_one(images, seeded(seed), padding, flip))
        assert fast.dtype == torch.uint8


def test_without_padding_an_image_stays_or_is_mirrored():
    row = torch.arange(1, 5, dtype=torch.uint8).view(1, 1, 4, 1).expand(64, 1, 4, 1)
    seen = {tuple(image.flatten().tolist()) for image in random_crop_flip(row, seeded(1), padding=0)}
    assert seen == {(1, 2, 3, 4), (4, 3, 2, 1)}


def test_every_crop_of_a_row_occurs_and_padding_is_black():
    row = torch.tensor([5, 6, 7], dtype=torch.uint8).view(1, 1, 3, 1).expand(200, 1, 3, 1)
    crops = random_crop_flip(row, seeded(2), padding=1, flip=False).flatten(1)
    # padded row 0 5 6 7 0, with a black row above and below it
    assert {tuple(c) for c in crops.tolist()} == {(0, 5, 6), (5, 6, 7), (6, 7, 0), (0, 0, 0)}


def test_images_of_a_batch_are_drawn_independently_and_the_input_stays():
    images = noise(1, 8, 8, 3).expand(20, 8, 8, 3).contiguous()
    before = images.clone()
    augmented = random_crop_flip(images, seeded(3))
    assert len({image.numpy().tobytes() for image in augmented}) > 10
    assert torch.equal(images, before)


def test_memory_layout_does_not_matter():
    images = noise(6, 3, 8, 8).permute(0, 2, 3, 1)
    expected = random_crop_flip(images.contiguous(), seeded(4))
    assert torch.equal(random_crop_flip(images, seeded(4)), expected)


# -- views -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["none", "crop", "crop-flip"])
@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_views_agree_with_the_loop_over_images(kind, seed):
    images, rows = noise(50, 3, 8, 6), np.arange(50) * 977
    for number in range(3):
        view = View(seed, number, kind, 0 if kind == "none" else 2)
        assert torch.equal(view.of(images, rows), view_one_by_one(view, images, rows))


def test_a_view_of_an_image_does_not_depend_on_its_batch():
    view, images, rows = View(7, 1, "crop-flip", 4), noise(40, 3, 8, 8), np.arange(100, 140)
    order = torch.randperm(40, generator=seeded(1))[:13]
    assert torch.equal(view.of(images[order], rows[order.numpy()]), view.of(images, rows)[order])


def test_views_and_images_are_drawn_evenly():
    """8,100 crops of 9 x 9 places and two directions: each expected 50 times, standard deviation 7."""
    row = torch.arange(1, 10, dtype=torch.uint8)
    images = (row[:, None] * 16 + row).expand(8100, 1, 9, 9)
    seen = View(0, 0, "crop-flip", 4).of(images, np.arange(8100))[:, 0]
    _, counts = torch.unique(seen.flatten(1), dim=0, return_counts=True)
    assert len(counts) == 162
    assert counts.min() > 20
    assert counts.max() < 85
    other = View(0, 1, "crop-flip", 4).of(images, np.arange(8100))[:, 0]
    assert (seen == other).flatten(1).all(1).float().mean() < 0.02


def test_epochs_take_the_views_in_turn_and_devices_share_them():
    held = toys.source()
    samples = Samples(held.train, np.arange(3, 60, 2))

    def epoch(view, size=8, seed=1):
        batches = training_batches(samples, size, seed, augmentation="crop-flip", padding=2, device=toys.CPU, view=view)
        return {int(samples.indices[m]): i for b in batches for m, i in zip(b.members, b.images, strict=True)}

    context = toys.context(0, [0, 1])
    assert context.view(0) is None
    views = [View(3, n, "crop-flip", 2) for n in range(2)]
    first, again, second = epoch(views[0]), epoch(views[0], size=5, seed=2), epoch(views[1])
    assert len(first) == len(samples)
    assert all(torch.equal(first[row], again[row]) for row in again)
    assert any(not torch.equal(first[row], second[row]) for row in first)


def test_a_view_reads_no_image_before_it_is_asked_for():
    class Unread:
        def __getitem__(self, rows):
            raise AssertionError("read")

    held = toys.source().train
    samples = Samples(type(held)(Unread(), held.labels, held.classes), np.arange(8))
    view = View(0, 0, "crop-flip", 1)
    batch = next(training_batches(samples, 8, 0, augmentation="crop-flip", padding=1, device=toys.CPU, view=view))
    assert len(batch) == 8
    with pytest.raises(AssertionError, match="read"):
        _ = batch.images
