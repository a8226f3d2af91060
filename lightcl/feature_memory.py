"""Memorise Feature Patterns: which channels of the suffix are vital, and how far they may drift.

LightCL, Wang et al., ASP-DAC 2025 (arXiv 2407.10545), section "Memorize Feature Patterns".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from lightcl.networks.resnet import FeatureMaps

Reduction = Literal["sum", "relative"]
VitalSelection = Literal["exact", "paper"]


def channel_importance(feature_map: Tensor) -> Tensor:
    """`[N, C, H, W]` -> `[C]`: the sum over samples and positions of |F[n, c, h, w]|."""
    return feature_map.abs().sum((0, 2, 3), dtype=torch.float32)


def vital_channels(importance: Tensor, ratio: float, selection: VitalSelection = "exact") -> Tensor:
    """Boolean mask `[C]` of the most important channels.

    `keep = int(C * ratio + 0.5)`. "exact" marks just `keep` channels (at least one), the lower index first among
    equals. "paper" takes the max(1, C - keep)-th smallest importance as a threshold and marks everything at or above
    it, which is one channel more than `keep`.
    """
    channels = importance.numel()
    keep = int(channels * ratio + 0.5)
    if selection == "paper":
        threshold = importance.sort().values[max(1, channels - keep) - 1]
        return importance >= threshold
    order = importance.sort(descending=True, stable=True).indices
    mask = torch.zeros(channels, dtype=torch.bool, device=importance.device)
    mask[order[: max(1, keep)]] = True
    return mask


def vital_patterns(maps: FeatureMaps, vital: Mapping[str, Tensor]) -> FeatureMaps:
    """What of the feature maps `[M, C, H, W]` has to be stored for `drift`: the vital channels, `[M, V, H, W]`."""
    return {name: maps[name][:, mask].float() for name, mask in vital.items()}


def drift(maps: FeatureMaps, stored: FeatureMaps, vital: Mapping[str, Tensor], reduction: Reduction) -> Tensor:
    """How far the vital channels have moved from the stored patterns; a scalar.

    `maps[m]` are `[M, C, H, W]`, `vital[m]` is a boolean `[C]` with V channels set, and `stored[m]` are `[M, V, H, W]`:
    of the patterns only the vital channels are kept (`vital_patterns`).

    - "sum" (the paper): Σ_m Σ (mask_m ⊙ (F_m - F*_m))². It grows with the number of channels and positions, so the
      same β is felt less in a narrower network.
    - "relative" (ours): the mean over the maps of Σ(mask ⊙ (F - F*))² / Σ(mask ⊙ F*)². It has no unit, so a β means
      the same at every width, resolution and memory size.
    """
    terms = []
    for name, mask in vital.items():
        # Indexing first keeps the graph's temporaries at the vital share of the map instead of the whole of it.
        now, then = maps[name][:, mask].float(), stored[name]
        term = (now - then).square().sum()
        terms.append(term if reduction == "sum" else term / then.square().sum().clamp_min(1e-12))
    if not terms:  # everything but the head is frozen
        return torch.zeros(())
    total = torch.stack(terms)
    return total.sum() if reduction == "sum" else total.mean()


def logit_drift(logits: Tensor, stored: Tensor, reduction: Reduction) -> Tensor:
    """The same for logits `[M, K]`, all of which count."""
    moved = (logits.float() - stored).square().sum()
    return moved if reduction == "sum" else moved / stored.square().sum().clamp_min(1e-12)
