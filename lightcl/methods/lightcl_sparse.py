"""LightCL's sparse variant: LightCL on a network whose deep layers are pruned before the first task.

Wang, Cheng, Ji, Huang: "LightCL: Compact Continual Learning with Low Memory Footprint For Edge Device", ASP-DAC 2025,
arXiv 2407.10545. Pruning removes 0.7 of the channels of layer3, 0.8 of layer4 and 0.2 elsewhere, which is about 0.9 of
ResNet-18's parameters; the channels whose weights have the smallest mean are removed. Loss and feature memory are those
of LightCL on the remaining channels, and `ratio` is a share of these.

Deviations: the channels are removed physically and not masked (for shortcuts see lightcl/networks/pruning.py). In
the paper's code layer3's second block is trained in the first task; here the prefix must stay the same on every device,
so a freeze point does not move during a stream. `network.freeze: layer3.0` trains that block throughout; use it with
`preset: paper` or `memory_batch_norm: train`, since the running statistics of a newly pruned block are too far off to
compute patterns with them (the loss diverged in our runs).

Cost: a frozen prefix cannot recover from pruning. With the built-in weights, the variances of batch-norm's inputs after
pruning are a tenth of the stored ones, and accuracy falls much more than in the paper. Batch statistics in the prefix
(`preset: paper`, or `network.frozen_batch_norm: train`) recover a part of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, field_validator

from lightcl.methods.base import register
from lightcl.methods.lightcl import LightCL, LightCLParameters
from lightcl.networks.pruning import Score, prune_
from lightcl.networks.staged import Backbone

PAPER_SPARSITY: dict[str, float] = {"layer1": 0.2, "layer2": 0.2, "layer3": 0.7, "layer4": 0.8}


class LightCLSparseParameters(LightCLParameters):
    """`lightcl-sparse`: LightCL's keys, and the share of channels that is removed from each layer."""

    order = 11
    name: Literal["lightcl-sparse"] = "lightcl-sparse"  # type: ignore[assignment]
    channel_sparsity: dict[Literal["layer1", "layer2", "layer3", "layer4"], Annotated[float, Field(ge=0, lt=1)]] = (
        Field(default=PAPER_SPARSITY, validate_default=True)
    )
    """Share of channels removed per layer; default for a missing layer: the paper's. The stem has layer1's channels."""
    channel_score: Score = "mean"
    """Which channels are removed. mean: those whose weights have the smallest mean (the paper); magnitude: the
    smallest mean magnitude."""

    @field_validator("channel_sparsity", mode="before")
    @classmethod
    def _fill_sparsity(cls, values: object) -> object:
        return PAPER_SPARSITY | dict(values) if isinstance(values, Mapping) else values

    def shape_(self, network: Backbone) -> None:
        prune_(network, {str(layer): share for layer, share in self.channel_sparsity.items()}, self.channel_score)


@register(LightCLSparseParameters)
class LightCLSparse(LightCL):
    """LightCL; only the network differs."""
