"""Guards around an aggregation. Guards on single updates (norms, weights) belong here, too."""

from __future__ import annotations

import logging

import numpy as np

from lightcl.exchange.tensors import Arrays

logger = logging.getLogger("flwr")


def adoptable(arrays: Arrays, round_number: int) -> bool:
    """Whether new shared tensors may replace the old ones: only finite values. If not, it warns."""
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            logger.warning("round %d: the new tensor %r is not finite; the old model is kept", round_number, name)
            return False
    return True
