"""The shares of GPUs that are requested from Ray."""

from __future__ import annotations

import pytest

from simulations.runtime import gpu_share


@pytest.mark.parametrize("gpus", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("workers", [1, 2, 3, 5, 6, 7, 16, 49, 64])
def test_all_workers_fit_onto_the_gpus(gpus: int, workers: int) -> None:
    """Flower waits for every worker that the sum of the shares has room for; Ray places no share on two GPUs."""
    share = gpu_share(gpus, workers)
    assert 0 < share <= 1
    assert int(1 / share) * gpus >= workers, "as Ray places them"
    assert int(gpus / share) >= workers, "as Flower counts them"
    assert share == 1 or (int(1 / share) - 1) * gpus < workers, "none smaller than it must be"
