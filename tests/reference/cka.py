"""Linear CKA (Kornblith et al., ICML 2019) by Gram matrices, written out in loops over plain Python numbers.

    CKA(K, L) = HSIC(K, L) / sqrt(HSIC(K, K) · HSIC(L, L)),   K = X Xᵀ, L = Y Yᵀ, HSIC(K, L) = tr(K H L H)

with H = I - 1/n, which takes the mean of every row and column away. Representations are lists of rows `[n][p]`.
"""

from __future__ import annotations

import math

Matrix = list[list[float]]


def gram(rows: Matrix) -> Matrix:
    return [[sum(a * b for a, b in zip(one, other, strict=True)) for other in rows] for one in rows]


def centered(kernel: Matrix) -> Matrix:
    """H K H."""
    n = len(kernel)
    of_row = [sum(row) / n for row in kernel]
    of_column = [sum(row[j] for row in kernel) / n for j in range(n)]
    whole = sum(of_row) / n
    return [[kernel[i][j] - of_row[i] - of_column[j] + whole for j in range(n)] for i in range(n)]


def hsic(one: Matrix, other: Matrix) -> float:
    """tr(K H L H), up to a factor that cancels in CKA."""
    k, m = centered(one), centered(other)
    return sum(k[i][j] * m[j][i] for i in range(len(k)) for j in range(len(k)))


def linear_cka(x: Matrix, y: Matrix) -> float:
    k, m = gram(x), gram(y)
    return hsic(k, m) / math.sqrt(hsic(k, k) * hsic(m, m))
