"""Memorize Feature Patterns: which channels of the suffix are vital, and how far they may drift.

LightCL, Wang et al., ASP-DAC 2025 (arXiv 2407.10545), section "Memorize Feature Patterns".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from lightcl.networks.layout import Layout
from lightcl.networks.native import NativeSquaredDrift
from lightcl.networks.staged import FeatureMaps, OnMap
from lightcl.storage.state import under

Reduction = Literal["sum", "relative"]
VitalSelection = Literal["exact", "paper"]


def channel_importance(feature_map: Tensor) -> Tensor:
    """`[N, C, H, W]` -> `[C]`: the sum over samples and positions of |F[n, c, h, w]|."""
    return feature_map.abs().sum((0, 2, 3), dtype=torch.float32)


def vital_channels(importance: Tensor, ratio: float, selection: VitalSelection = "exact") -> Tensor:
    """Boolean mask `[C]` of the most important channels.

    `keep = int(C * ratio + 0.5)`. "exact" marks exactly `keep` channels (at least one), at equal importance those with
    the lower index. "paper" takes the max(1, C - keep)-th smallest importance as a threshold and marks everything at or
    above it, which is one channel more than `keep`.
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
    """The vital channels `[M, V, H, W]` of the feature maps `[M, C, H, W]`, as `Drift` takes them."""
    return {name: maps[name][:, mask].float() for name, mask in vital.items()}


Constants = tuple[Tensor, Tensor]
"""Of a map: the indices `[V]` of its vital channels, and Σ F*²."""


class Drift:
    """The drift of feature maps from stored patterns: the sum or the mean of one term per map.

    `on_map` takes the maps `[M, C, H, W]` as they are computed, by name. `vital[m]` is a boolean `[C]` with V channels
    set, and `stored[m]` are the patterns `[M, V, H, W]` of those channels (`vital_patterns`). Other maps are ignored.

    - "sum" (the paper): Σ_m Σ (mask_m ⊙ (F_m - F*_m))². It grows with the number of channels and positions, so the
      same β has less effect in a narrower network.
    - "relative" (ours): the mean over the maps of Σ(mask ⊙ (F - F*))² / Σ(mask ⊙ F*)². It is dimensionless, so a β
      means the same at every width, resolution and memory size.

    Memory: only the terms are kept, never the maps. Autograd runs in the reverse order of creation: if the terms were
    computed after the entire forward pass, a full-sized gradient of every map would exist before the first is used.
    Because they are computed while the maps arrive, only one exists at a time.
    """

    def __init__(
        self, stored: FeatureMaps, vital: Mapping[str, Tensor], reduction: Reduction, first: int = 0,
        constants: dict[str, Constants] | None = None, native: bool = False,
    ) -> None:  # fmt: skip
        """The memory samples are those from `first` on. `constants` keeps from step to step what depends only on
        `stored` and `vital`. `native`: computed in C where that is possible."""
        self.stored, self.vital, self.reduction, self.first = stored, vital, reduction, first
        self.constants, self.native = {} if constants is None else constants, native
        self.terms: list[Tensor] = []

    def on_map(self, name: str, feature_map: Tensor) -> None:
        """Adds the term of a map."""
        if name in self.vital:
            then = self.stored[name]
            if name not in self.constants:
                self.constants[name] = self.vital[name].nonzero()[:, 0], then.square().sum().clamp_min(1e-12)
            channels, size = self.constants[name]
            in_c = self.native and _fits(feature_map)
            squared = NativeSquaredDrift if in_c else _SquaredDrift
            term: Tensor = squared.apply(feature_map, channels, then, self.first)
            self.terms.append(term / size if self.reduction == "relative" else term)

    def total(self) -> Tensor:
        """The scalar over all maps so far; 0 where there was no map (everything but the head is frozen)."""
        if not self.terms:
            return torch.zeros(())
        terms = torch.stack(self.terms)
        return terms.sum() if self.reduction == "sum" else terms.mean()


def _fits(feature_map: Tensor) -> bool:
    """Whether drift.c computes this map."""
    return (
        feature_map.device.type == "cpu"
        and feature_map.dtype in (torch.float32, torch.bfloat16)
        and feature_map.is_contiguous(memory_format=torch.channels_last)
    )


class _SquaredDrift(torch.autograd.Function):
    """Σ (F[first:, vital] - F*)² of one map `[N, C, H, W]`, fp32.

    The same as PyTorch's own operations to the bit. The gradient has the map's memory format, though, where theirs is
    contiguous and makes every operation before it slow; and only the difference, of the vital channels, is kept.
    """

    @staticmethod
    def forward(ctx: Any, feature_map: Tensor, channels: Tensor, then: Tensor, first: int) -> Tensor:
        difference = feature_map[first:].index_select(1, channels).float() - then
        ctx.save_for_backward(difference, channels)
        ctx.first, ctx.layout = first, Layout.of(feature_map)
        return difference.square().sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        difference, channels = ctx.saved_tensors
        of_map: Tensor = ctx.layout.empty(difference.device).zero_()
        of_map[ctx.first :].index_copy_(1, channels, (gradients[0] * (2 * difference)).to(of_map.dtype))
        return of_map, None, None, None


def logit_drift(logits: Tensor, stored: Tensor, reduction: Reduction) -> Tensor:
    """The same for logits `[M, K]`, without a mask."""
    moved = (logits.float() - stored).square().sum()
    return moved if reduction == "sum" else moved / stored.square().sum().clamp_min(1e-12)


Classify = Callable[[Tensor, OnMap], Tensor]
"""Suffix and head: prefix outputs `[M, C, H, W]` -> logits `[M, K]`; calls back with every map."""


@dataclass(frozen=True)
class Recorded:
    """The state recorded on the memory samples before a task."""

    inputs: Tensor
    """Prefix outputs `[M, C, H, W]` of the memory samples; their images where nothing is frozen."""
    patterns: FeatureMaps
    """F*, of the vital channels: `[M, V, H, W]` by map."""
    logits: Tensor
    """logits* `[M, T]` of the tied classes."""
    tied: Tensor
    """The T classes whose logits are regularized."""
    constants: dict[str, Constants] = field(default_factory=dict)
    """Of the drift of maps: what is the same in every step."""

    @classmethod
    def of(cls, inputs: Tensor, vital: Mapping[str, Tensor], tied: Tensor, classify: Classify) -> Recorded:
        """Passes the inputs through the current network."""
        maps: FeatureMaps = {}
        logits = classify(inputs, maps.__setitem__)[:, tied].float()
        return cls(inputs, vital_patterns(maps, vital), logits, tied)

    def drift(
        self, vital: Mapping[str, Tensor], reduction: Reduction, classify: Classify, *, native: bool = False
    ) -> Tensor:
        """The scalar Σ_m Σ (mask_m ⊙ (F_m - F*_m))² + Σ (logits - logits*)² of the current network."""
        of_maps = self.of_maps(vital, reduction, native=native)
        return self.total(of_maps, classify(self.inputs, of_maps.on_map))

    def of_maps(
        self, vital: Mapping[str, Tensor], reduction: Reduction, first: int = 0, *, native: bool = False
    ) -> Drift:
        """The drift of the maps alone, to be given them; the memory samples are those from `first` on."""
        return Drift(self.patterns, vital, reduction, first, self.constants, native)

    def total(self, of_maps: Drift, logits: Tensor) -> Tensor:
        """The scalar of `drift`, from the maps' drift and the memory samples' logits `[M, K]`."""
        return of_maps.total() + logit_drift(logits.index_select(1, self.tied), self.logits, of_maps.reduction)

    def state_dict(self) -> dict[str, Tensor]:
        state = {f"pattern/{name}": stored for name, stored in self.patterns.items()}
        return state | {"memory": self.inputs, "logits": self.logits, "tied": self.tied}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Recorded | None:
        """None where nothing was recorded."""
        if "memory" not in state:
            return None
        # Restores the original memory format: in another one, a mean over positions rounds differently.
        inputs = state["memory"].contiguous(memory_format=torch.channels_last)
        return cls(inputs, under(state, "pattern/"), state["logits"], state["tied"])
