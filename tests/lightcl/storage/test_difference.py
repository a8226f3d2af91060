import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from torch import Tensor

from lightcl.storage.difference import difference, restored

FLOATS = st.floats(width=32)  # with infinities, both zeros and NaN


def bits(tensor: Tensor) -> list[int]:
    return tensor.contiguous().view(torch.int32).ravel().tolist()


@settings(max_examples=200, deadline=None, database=None, derandomize=True)
@given(st.data(), array_shapes(max_side=6))
def test_any_weights_come_back_to_the_bit(data: st.DataObject, shape: tuple[int, ...]) -> None:
    """Long ones: a short difference is always longer than what it is the difference of."""
    weights, start = (
        torch.from_numpy(data.draw(arrays(np.float32, shape, elements=FLOATS))).repeat(64, *[1] * (len(shape) - 1))
        for _ in range(2)
    )
    content = difference(weights, start)
    if content is not None:
        assert len(content) < weights.nbytes
        assert bits(restored(content, start)) == bits(weights)


def test_rows_that_have_not_moved_take_no_room() -> None:
    start = torch.randn(200, 160)
    weights = start.clone()
    weights[:20] += 1e-4
    content = difference(weights, start)
    assert content is not None
    assert len(content) < 20 * 160 * 4
    assert bits(restored(content, start)) == bits(weights)


def test_weights_that_have_moved_a_little_take_less_room() -> None:
    start = torch.randn(200, 160) / 20
    weights = start + torch.randn(200, 160) / 1000
    content = difference(weights, start)
    assert content is not None
    assert len(content) < 0.75 * weights.nbytes
    assert bits(restored(content, start)) == bits(weights)


def test_another_order_in_memory_is_the_same() -> None:
    start = torch.randn(16, 16, 3, 3).contiguous(memory_format=torch.channels_last)
    content = difference(start.clone(), start.contiguous())
    assert content is not None
    assert torch.equal(restored(content, start), start)


@pytest.mark.parametrize(
    ("weights", "start"),
    [
        (torch.randn(100), torch.randn(100)),  # nothing in common
        (torch.zeros(100), torch.zeros(10, 10)),
        (torch.zeros(100, dtype=torch.float64), torch.zeros(100, dtype=torch.float64)),
        (torch.zeros(0), torch.zeros(0)),
    ],
)
def test_there_may_be_nothing_to_gain(weights: Tensor, start: Tensor) -> None:
    assert difference(weights, start) is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no difference",
        bytes(difference(torch.zeros(50), torch.zeros(50)).numpy()),  # type: ignore[union-attr]
        bytes(difference(torch.zeros(10**6), torch.zeros(10**6)).numpy()),  # type: ignore[union-attr]
    ],
)
def test_anything_else_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match="difference"):
        restored(torch.tensor(list(content), dtype=torch.uint8), torch.zeros(100))
