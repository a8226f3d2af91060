"""Seeds are a function of their purpose."""

import pytest
import torch

from lightcl.seeds import derive, numpy_generator, torch_generator


def test_derived_seeds_are_the_same_on_every_machine():
    # int.from_bytes(sha256(b"7/order/3/0/2").digest()[:8], "big") >> 1
    assert derive(7, "order", 3, 0, 2) == 85149211071163941


def test_every_part_of_the_purpose_counts():
    purposes = [(7, "order", 3), (8, "order", 3), (7, "memory", 3), (7, "order", 4), (7, 3, "order"), (7, "order")]
    assert len({derive(*purpose) for purpose in purposes}) == len(purposes)


@pytest.mark.parametrize("seed", range(20))
def test_seeds_fit_every_generator(seed):
    assert 0 <= derive(seed, "x") < 2**63


def test_generators_repeat():
    assert torch.equal(
        torch.rand(3, generator=torch_generator(1, "a", 2)), torch.rand(3, generator=torch_generator(1, "a", 2))
    )
    assert numpy_generator(1, "a").integers(1 << 60) == numpy_generator(1, "a").integers(1 << 60)
    assert numpy_generator(1, "a").integers(1 << 60) != numpy_generator(1, "b").integers(1 << 60)
