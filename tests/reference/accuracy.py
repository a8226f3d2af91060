"""Figures of an accuracy matrix, from their definitions: `A[t][k]` is the accuracy on task k after task t (k <= t)."""

from __future__ import annotations

Rows = list[list[float]]


def average_accuracy(rows: Rows) -> float:
    """ACC = 1/T Σ_k A[T, k] (Lopez-Paz & Ranzato 2017)."""
    return sum(rows[-1]) / len(rows[-1])


def forgetting(rows: Rows) -> float:
    """F = 1/(T-1) Σ_{k<T} max_{t<T} A[t, k] - A[T, k] (Chaudhry et al. 2018)."""
    last = len(rows) - 1
    total = 0.0
    for k in range(last):
        best = max(rows[t][k] for t in range(k, last))
        total += best - rows[last][k]
    return total / last if last else 0.0


def backward_transfer(rows: Rows) -> float:
    """BWT = 1/(T-1) Σ_{k<T} A[T, k] - A[k, k] (Lopez-Paz & Ranzato 2017)."""
    last = len(rows) - 1
    total = 0.0
    for k in range(last):
        total += rows[last][k] - rows[k][k]
    return total / last if last else 0.0
