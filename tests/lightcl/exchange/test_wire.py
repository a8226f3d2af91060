"""Tensors in one piece, and bytes that only claim to be that."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightcl.exchange.tensors import ExchangeError
from lightcl.exchange.wire import PACKED, decoded, packed


class Sent:
    """Stands for Flower's Array: what `numpy()` of it gives."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    def numpy(self) -> np.ndarray:
        return self._array


def received(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return decoded({name: Sent(array) for name, array in arrays.items()})


def test_packed_tensors_are_those_that_were_packed() -> None:
    arrays = {
        "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
        "half": np.array([1.5, -2], dtype=np.float16),
        "sums": np.array([[1e300]]),
        "scalar": np.array(3.0, dtype=np.float32),
        "turned": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "empty": np.zeros((0, 4), dtype=np.float32),
    }
    found = packed(arrays)
    assert list(found) == [PACKED]
    assert found[PACKED].dtype == np.uint8
    back = received(found)
    assert back.keys() == arrays.keys()
    for name, array in arrays.items():
        assert back[name].dtype == array.dtype
        assert back[name].shape == array.shape
        assert np.array_equal(back[name], array)
        assert back[name].flags.writeable


def test_nothing_is_packed_as_nothing() -> None:
    assert packed({}) == {}
    assert received({}) == {}


def test_tensors_that_are_not_packed_stay_as_they_are() -> None:
    array = np.ones(3, dtype=np.float32)
    assert received({"w": array})["w"] is array
    beside = received({PACKED: np.zeros(3, dtype=np.uint8), "w": array})
    assert set(beside) == {PACKED, "w"}  # a check by name refuses it


@pytest.mark.parametrize(
    "array", [np.zeros(3), np.zeros((2, 2), np.uint8), np.array(5, np.uint8), np.zeros(0, np.uint8)]
)
def test_a_packed_tensor_that_is_no_bytes_is_refused(array: np.ndarray) -> None:
    with pytest.raises(ExchangeError, match="packed tensors"):
        received({PACKED: array})


@pytest.mark.parametrize(
    "header",
    [
        '{"w":{"dtype":"F64","shape":[1000000000000],"data_offsets":[0,8000000000000]}}',
        '{"w":{"dtype":"F64","shape":[10000000000,10000000000,10000000000],"data_offsets":[0,8]}}',
        '{"w":{"dtype":"F32","shape":[2],"data_offsets":[4,0]}}',
        '{"w":{"dtype":"BF16","shape":[4],"data_offsets":[0,8]}}',
        "[" * 1000,
    ],
    ids=["8 TB", "10^30 elements", "backwards", "no NumPy type", "unbalanced"],
)
def test_a_header_that_promises_too_much_is_refused(header: str) -> None:
    text = header.encode()
    content = len(text).to_bytes(8, "little") + text + bytes(8)
    with pytest.raises(ExchangeError) as found:
        received({PACKED: np.frombuffer(content, dtype=np.uint8)})
    assert len(str(found.value)) < 200


@given(flips=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=6), cut=st.integers(0, 200))
def test_damaged_bytes_are_tensors_or_refused(flips: list[tuple[int, int]], cut: int) -> None:
    content = bytearray(packed({"w": np.ones((3, 4), np.float32), "b": np.zeros(2, np.float16)})[PACKED].tobytes())
    for position, bits in flips:
        content[position % len(content)] ^= bits
    data = np.frombuffer(bytes(content[: len(content) - cut % len(content)]), dtype=np.uint8)
    try:
        found = received({PACKED: data})
    except ExchangeError as error:
        assert len(str(error)) < 200  # noqa: PT017 the other outcome is as good
    else:
        assert all(isinstance(array, np.ndarray) for array in found.values())
