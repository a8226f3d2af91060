"""The batched augmentation, by hand and against a loop over images with the same draws."""

import pytest
import torch

from lightcl.data.augment import random_crop_flip
from tests.reference.augmentation import crop_flip_one_by_one


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
