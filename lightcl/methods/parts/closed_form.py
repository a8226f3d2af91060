"""Streaming linear discriminant analysis: a classifier computed from sums, which forget nothing.

Each class c is summed up by its number of samples n_c and the sum s_c of its features; all classes together by one
matrix G = Σ x xᵀ. Means and the shared covariance follow exactly, in whatever order or on whichever device the samples
were met: μ_c = s_c / n_c, Σ = (G - Σ_c n_c μ_c μ_cᵀ) / n. With equal priors

    log p(c | x) = μ_cᵀ Σ'⁻¹ x - ½ μ_cᵀ Σ'⁻¹ μ_c + const,    Σ' = Σ + shrinkage · tr(Σ)/d · I.

Pang, Ozawa, Kasabov, "Incremental linear discriminant analysis for classification of data streams", IEEE Trans. SMC-B
2005; Hayes and Kanan, "Lifelong machine learning with deep streaming LDA", CVPR workshops 2020 (they keep the features
of a frozen network, as we do, and update Σ sample by sample; we keep G, whose parts add up over tasks and devices).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

ROWS = 32
"""Rows of the Gram matrix that are worked out at a time."""
TURNS = 20
"""How often more is added to a covariance's diagonal, ten times as much each time, until it has an inverse."""


@dataclass
class Statistics:
    """Sums over the samples of a stream, in fp64: `count` `[C]`, `total` `[C, d]`, `gram` `[d(d+1)/2]`.

    `gram` is the upper triangle of Σ x xᵀ, row by row; the other half says the same.
    """

    count: Tensor
    total: Tensor
    gram: Tensor

    @classmethod
    def zeros(cls, classes: int, features: int) -> Statistics:
        sizes = ((classes,), (classes, features), (features * (features + 1) // 2,))
        return cls(*(torch.zeros(size, dtype=torch.float64) for size in sizes))

    def add_(self, features: Tensor, labels: Tensor) -> None:
        """Takes in features `[N, d]` with labels `[N]` in 0..C-1, without ever making a matrix `[d, d]` of them."""
        x = features.to("cpu", torch.float64)
        self.count.index_add_(0, labels.cpu(), torch.ones(len(x), dtype=torch.float64))
        self.total.index_add_(0, labels.cpu(), x)
        size, done = x.shape[1], 0
        for first in range(0, size, ROWS):
            rows = x[:, first : first + ROWS].T @ x[:, first:]
            for index, row in enumerate(rows):
                self.gram[done : done + size - first - index] += row[index:]
                done += size - first - index

    def tensors(self) -> dict[str, Tensor]:
        return {"count": self.count, "total": self.total, "gram": self.gram}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Statistics:
        return cls(*(tensors[name].to("cpu", torch.float64) for name in ("count", "total", "gram")))


@dataclass(frozen=True)
class LinearHead:
    """Log-posteriors up to a constant: `x @ weight.T + bias`, for the classes that are `known`; fp32.

    `weight` `[C, d]`, `bias` `[C]`, `known` `[C]` (1 where the class has samples, else 0).
    """

    weight: Tensor
    bias: Tensor
    known: Tensor

    def log_posteriors(self, features: Tensor) -> Tensor:
        """`[N, d]` -> `[N, C]`, normalized over the known classes; minus infinity for the others."""
        with torch.autocast(features.device.type, enabled=False):  # bf16 is too coarse for these sums
            scores = features @ self.weight.T + self.bias
        return scores.masked_fill(self.known == 0, float("-inf")).log_softmax(1)

    def tensors(self) -> dict[str, Tensor]:
        return {"weight": self.weight, "bias": self.bias, "known": self.known}


def discriminant_head(statistics: Statistics, shrinkage: float) -> LinearHead:
    """Solves the formula above. Without any sample no class is known.

    Raises ValueError for sums that are not finite, or whose covariance is not positive definite.
    """
    if not all(bool(tensor.isfinite().all()) for tensor in statistics.tensors().values()):
        raise ValueError("the statistics hold numbers that are not finite")
    count, total = statistics.count, statistics.total
    features = total.shape[1]
    if not bool(count.any()):
        return LinearHead(torch.zeros_like(total).float(), torch.zeros_like(count).float(), (count > 0).float())
    means = total / count.clamp_min(1)[:, None]
    # In place from here on: this is the largest matrix that the method ever makes.
    covariance = from_upper_triangle(statistics.gram, features)
    second_moment = covariance.diagonal().mean() / count.sum()
    covariance.addmm_(total.T, means, alpha=-1).div_(count.sum())
    covariance.diagonal().add_(shrinkage * covariance.diagonal().mean().clamp_min(1e-12))
    factor, failed = torch.linalg.cholesky_ex(covariance)
    # Rounding may leave an eigenvalue below zero where the shrinkage is tiny; even the mean of all may be, where the
    # features' means are large beside their variances. Rounding errors are those of the second moment.
    more = torch.maximum(1e-10 * covariance.diagonal().mean(), 1e-12 * second_moment)
    for _ in range(TURNS):
        if not bool(failed):
            break
        covariance.diagonal().add_(more)
        factor, failed = torch.linalg.cholesky_ex(covariance)
        more *= 10
    if bool(failed):
        raise ValueError("the statistics are inconsistent: their covariance is not positive definite")
    weight = torch.cholesky_solve(means.T, factor).T
    return LinearHead(weight.float(), (-0.5 * (means * weight).sum(1)).float(), (count > 0).float())


def from_upper_triangle(packed: Tensor, size: int) -> Tensor:
    """The symmetric matrix `[size, size]` of which `packed` is the upper triangle."""
    matrix = packed.new_zeros(size, size)
    for index, row in enumerate(torch.split(packed, [size - i for i in range(size)])):
        matrix[index, index:] = row
        matrix[index:, index] = row
    return matrix


def statistics_bytes(classes: int, features: int) -> int:
    """What `Statistics` and the head solved from them take together."""
    return 8 * (classes + classes * features + features * (features + 1) // 2) + 4 * classes * (features + 2)
