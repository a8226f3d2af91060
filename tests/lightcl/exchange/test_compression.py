"""Codecs: what they save, and the error that they state."""

from __future__ import annotations

import numpy as np
import pytest

from lightcl.exchange.compression import CODECS, codec_named
from lightcl.exchange.tensors import size_in_bytes


@pytest.mark.parametrize("name", list(CODECS))
def test_names_shapes_and_types_survive(name: str) -> None:
    arrays = {"a": np.ones((2, 3), np.float32), "statistics/gram": np.full(4, 1e9), "scalar": np.array(0.5, np.float32)}
    codec = codec_named(name)
    restored = codec.restore(codec.compress(arrays))
    assert {n: (a.shape, a.dtype) for n, a in restored.items()} == {n: (a.shape, a.dtype) for n, a in arrays.items()}
    for key, array in arrays.items():
        np.testing.assert_array_equal(restored[key], array)


def test_fp16_halves_the_bytes_and_keeps_its_stated_error() -> None:
    generator = np.random.default_rng(0)
    exponents = generator.uniform(-30, 15.9, 20_000)
    values = (generator.choice([-1, 1], 20_000) * 2.0**exponents).astype(np.float32)
    codec = codec_named("fp16")
    sent = codec.compress({"a": values})
    assert size_in_bytes(sent) == 2 * 20_000
    error = np.abs(codec.restore(sent)["a"].astype(np.float64) - values)
    normal = np.abs(values) >= 2.0**-14
    assert (error[normal] <= 2.0**-11 * np.abs(values[normal])).all()
    assert (error[~normal] <= 2.0**-25).all()


@pytest.mark.parametrize("value", [65_505.0, float("inf"), float("nan")])
def test_fp16_sends_what_it_cannot_hold_as_it_is(value: float) -> None:
    arrays = {"a": np.array([value, 0.1], np.float32)}
    sent = codec_named("fp16").compress(arrays)
    assert sent["a"].dtype == np.float32
    np.testing.assert_array_equal(sent["a"], arrays["a"])
