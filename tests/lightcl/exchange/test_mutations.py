"""Thousands of damaged tensors and class sums: each is taken as valid or refused with one ExchangeError."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightcl.exchange.compression import CODECS, codec_named
from lightcl.exchange.tensors import STATISTICS, ExchangeError, check
from lightcl.methods.parts.closed_form import Statistics, discriminant_head

EXAMPLES = settings(max_examples=500, deadline=None, database=None, derandomize=True)
NUMBERS = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from([0.0, -1.0, 1e30, 1e300, 3.4e38, -3.4e38, 65504.0, 65520.0, 1e-45]),
)
TYPES = st.sampled_from(["f2", "f4", "f8", "g", ">f4", ">f8", "i4", "u1", "?", "c8", "U3", "M8[s]"])
SHAPES: dict[str, tuple[int, ...]] = {"w": (2, 3), "bn.running_var": (3,)}
CLASSES, FEATURES = 3, 2


@EXAMPLES
@given(
    name=st.sampled_from([*SHAPES, "another"]),
    shape=st.sampled_from([(2, 3), (3,), (), (0,), (3, 2), (1, 2, 3)]),
    kind=TYPES,
    number=NUMBERS,
    codec=st.sampled_from(sorted(CODECS)),
)
def test_any_tensor_is_taken_or_refused(
    name: str, shape: tuple[int, ...], kind: str, number: float, codec: Any
) -> None:
    arrays = {known: np.ones(size, dtype=np.float32) for known, size in SHAPES.items()}
    with np.errstate(all="ignore"):
        try:
            array = np.full(shape, number).astype(kind)
        except (ValueError, OverflowError):  # not a number of this type
            return
        arrays[name] = array
        try:
            restored = codec_named(codec).restore(arrays)
            check(restored, SHAPES)
        except ExchangeError as error:
            refused = str(error)
            assert repr(name) in refused
            return
    assert arrays.keys() == SHAPES.keys()
    for known, size in SHAPES.items():
        tensor = torch.from_numpy(np.asarray(restored[known], dtype=np.float32))
        assert tensor.shape == size
        assert tensor.isfinite().all(), "in the type in which it is used"
    assert (np.asarray(restored["bn.running_var"]) >= 0).all()


def sums() -> dict[str, np.ndarray]:
    """Of six samples of two features, in two of three classes."""
    statistics = Statistics.zeros(CLASSES, FEATURES)
    generator = torch.Generator().manual_seed(0)
    statistics.add_(torch.randn(6, FEATURES, generator=generator), torch.tensor([0, 0, 0, 1, 1, 1]))
    return {f"{STATISTICS}{name}": tensor.numpy() for name, tensor in statistics.tensors().items()}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@EXAMPLES
@given(
    changes=st.dictionaries(
        st.tuples(st.sampled_from(["count", "total", "gram"]), st.integers(0, 5)), NUMBERS, min_size=1, max_size=4
    ),
    kind=st.sampled_from(["f2", "f4", "f8"]),
)
def test_any_class_sums_are_refused_or_give_a_finite_head(changes: dict[tuple[str, int], float], kind: str) -> None:
    arrays = sums()
    shapes = {name: array.shape for name, array in arrays.items()}
    with np.errstate(all="ignore"):
        arrays = {name: array.astype(kind) for name, array in arrays.items()}
        for (name, position), number in changes.items():
            flat = arrays[f"{STATISTICS}{name}"].reshape(-1)
            flat[position % flat.size] = number
    try:
        check(arrays, shapes)
    except ExchangeError as error:
        assert STATISTICS in str(error)  # noqa: PT017 the other outcome is as good
        return
    plain = {
        name: torch.from_numpy(arrays[f"{STATISTICS}{name}"].astype(np.float64)) for name in ("count", "total", "gram")
    }
    try:
        head = discriminant_head(Statistics.from_tensors(plain), 1e-4)
    except ValueError:
        return  # which the server takes for a refusal as well
    assert all(bool(tensor.isfinite().all()) for tensor in head.tensors().values())
    assert head.known.tolist() == [float(number > 0) for number in plain["count"].tolist()]


def test_class_sums_in_fp32_that_overflow_there_are_refused_as_sums() -> None:
    """They were a LinAlgError, which ended the server."""
    arrays = {name: array.astype(np.float32) for name, array in sums().items()}
    arrays[f"{STATISTICS}total"][0, 0] = 1e30
    with pytest.raises(ExchangeError, match="inconsistent"):
        check(arrays, {name: array.shape for name, array in arrays.items()})
