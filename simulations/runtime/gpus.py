"""Shares of GPUs for workers."""

from __future__ import annotations

from math import ceil


def gpu_share(gpus: int, workers: int) -> float:
    """Share of one GPU per worker. Ray places a share on a single GPU and accepts no fraction above 1."""
    return 1 / ceil(workers / gpus)
