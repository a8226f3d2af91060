"""What the guards around an aggregation share. The guard on weights is in guard.py, that on sums in statistics.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lightcl.exchange.tensors import Arrays

FEW = 3
"""The smallest number of values whose median is honest although one is not."""


def not_finite(arrays: Mapping[str, np.ndarray]) -> str | None:
    """The name of a tensor with a value that is not finite, if there is one."""
    return next((name for name, array in arrays.items() if not np.isfinite(array).all()), None)


def coordinate_median(arrays: Sequence[Mapping[str, np.ndarray]]) -> Arrays:
    """The median of each value, by name. All mappings must have the same names and shapes."""
    return {
        name: np.median(np.stack([device[name] for device in arrays]), axis=0).astype(np.float32) for name in arrays[0]
    }


def lower_median(values: Sequence[float] | np.ndarray) -> float:
    """The median, of an even number the smaller of the two in the middle: an attacker's is mostly the larger one."""
    return float(np.sort(values)[(len(values) - 1) // 2])
