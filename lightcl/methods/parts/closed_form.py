"""Streaming linear discriminant analysis: a classifier computed from sums, which forget nothing.

The sums are, for each class c, the number of samples n_c and the sum s_c of their features, and for all classes
together one matrix G = Σ x xᵀ. They give the means and the shared covariance exactly, whatever the order of the samples
and the device that saw them: μ_c = s_c / n_c, Σ = (G - Σ_c n_c μ_c μ_cᵀ) / n. With equal priors

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
"""Rows of the Gram matrix that are computed at a time."""
ATTEMPTS = 20
"""How often the diagonal of a covariance is increased, ten times as much each time, until it can be inverted."""


@dataclass
class Statistics:
    """Sums over the samples of a stream, in fp64: `count` `[C]`, `total` `[C, d]`, `gram` `[d(d+1)/2]`.

    `gram` is the upper triangle of Σ x xᵀ, row by row; the matrix is symmetric.
    """

    count: Tensor
    total: Tensor
    gram: Tensor

    @classmethod
    def zeros(cls, classes: int, features: int) -> Statistics:
        sizes = ((classes,), (classes, features), (features * (features + 1) // 2,))
        return cls(*(torch.zeros(size, dtype=torch.float64) for size in sizes))

    def add_(self, features: Tensor, labels: Tensor) -> None:
        """Adds features `[N, d]` with labels `[N]` in 0..C-1, without ever allocating a matrix `[d, d]`."""
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
        """`[N, d]` -> `[N, C]`, normalized over the known classes; minus infinity for the others.

        In fp64: the weights of features that hardly vary are large, and their products cancel. In fp32 the sums of 560
        features of the digits were off by 0.15, which is a percent of a probability.
        """
        with torch.autocast(features.device.type, enabled=False):
            scores = features.double() @ self.weight.double().T + self.bias.double()
        return scores.masked_fill(self.known == 0, float("-inf")).log_softmax(1).float()

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
    # In place from here on: this is the largest matrix of the method.
    covariance = from_upper_triangle(statistics.gram, features)
    second_moment = covariance.diagonal().mean() / count.sum()
    covariance.addmm_(total.T, means, alpha=-1).div_(count.sum())
    covariance.diagonal().add_(shrinkage * covariance.diagonal().mean().clamp_min(1e-12))
    factor, failed = torch.linalg.cholesky_ex(covariance)
    # Rounding may make an eigenvalue negative where the shrinkage is tiny, and even the mean of all eigenvalues where
    # the features' means are large compared with their variances. Rounding errors scale with the second moment.
    more = torch.maximum(1e-10 * covariance.diagonal().mean(), 1e-12 * second_moment)
    for _ in range(ATTEMPTS):
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
    """Bytes of `Statistics` and of the head solved from them, together."""
    return 8 * (classes + classes * features + features * (features + 1) // 2) + 4 * classes * (features + 2)
