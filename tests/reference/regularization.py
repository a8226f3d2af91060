"""LightCL's "Memorize Feature Patterns" (arXiv 2407.10545), written out in loops over plain Python numbers.

Feature maps are nested lists `[N][C][H][W]`, logits `[N][K]`, masks `[C]`: `tensor.tolist()` of the fast version's.
"""

from __future__ import annotations

import math

FeatureMap = list[list[list[list[float]]]]
Matrix = list[list[float]]


def channel_importance(feature_map: FeatureMap) -> list[float]:
    """Of channel c: the sum over samples and positions of |F[n][c][h][w]|."""
    importance = [0.0] * len(feature_map[0])
    for sample in feature_map:
        for c, channel in enumerate(sample):
            for row in channel:
                for value in row:
                    importance[c] += abs(value)
    return importance


def vital_as_in_the_paper(importance: list[float], ratio: float) -> list[bool]:
    """keep = int(C·ratio + 0.5); threshold = the max(1, C - keep)-th smallest; vital = importance >= threshold."""
    keep = int(len(importance) * ratio + 0.5)
    threshold = sorted(importance)[max(1, len(importance) - keep) - 1]
    return [value >= threshold for value in importance]


def vital_exactly(importance: list[float], ratio: float) -> list[bool]:
    """The max(1, keep) most important channels; among equals the lower index comes first."""
    keep = max(1, int(len(importance) * ratio + 0.5))
    vital = [False] * len(importance)
    for _ in range(keep):
        best = None
        for c, value in enumerate(importance):
            if not vital[c] and (best is None or value > importance[best]):
                best = c
        assert best is not None
        vital[best] = True
    return vital


def masked_squares(now: FeatureMap, then: FeatureMap, mask: list[bool]) -> tuple[float, float]:
    """(Σ (mask ⊙ (now - then))², Σ (mask ⊙ then)²)."""
    moved = size = 0.0
    for n, sample in enumerate(now):
        for c, channel in enumerate(sample):
            if not mask[c]:
                continue
            for h, row in enumerate(channel):
                for w, value in enumerate(row):
                    moved += (value - then[n][c][h][w]) ** 2
                    size += then[n][c][h][w] ** 2
    return moved, size


def regularization(
    maps: dict[str, FeatureMap],
    stored: dict[str, FeatureMap],
    masks: dict[str, list[bool]],
    logits: Matrix,
    stored_logits: Matrix,
    reduction: str,
) -> float:
    """What β multiplies.

    sum: Σ_m Σ (mask_m ⊙ (F_m - F*_m))² + Σ (logits - logits*)²; relative: each sum over that of its patterns' squares,
    and the mean over the maps.
    """
    logit_moved = logit_size = 0.0
    for row, stored_row in zip(logits, stored_logits, strict=True):
        for value, stored_value in zip(row, stored_row, strict=True):
            logit_moved += (value - stored_value) ** 2
            logit_size += stored_value**2
    if reduction == "sum":
        return sum(masked_squares(maps[m], stored[m], masks[m])[0] for m in masks) + logit_moved
    shares = []
    for m in masks:
        moved, size = masked_squares(maps[m], stored[m], masks[m])
        shares.append(moved / size)
    return sum(shares) / len(shares) + logit_moved / logit_size


def cross_entropy(logits: Matrix, labels: list[int], classes: list[int]) -> float:
    """Mean over samples of -log softmax over `classes` alone, at the label."""
    total = 0.0
    for row, label in zip(logits, labels, strict=True):
        total -= row[label] - math.log(sum(math.exp(row[c]) for c in classes))
    return total / len(labels)
