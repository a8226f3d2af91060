"""The scenario's section `network`: architecture, weights and freeze point."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lightcl.networks import BACKBONES
from lightcl.networks.resnet import Stem
from lightcl.registry import OneOf
from lightcl.section import Section

NAMED_WEIGHTS = ("builtin", "imagenet", "none")
"""Values of `network.weights` other than a file."""


class Network(Section):
    name: Annotated[str, OneOf(BACKBONES)] = "resnet18"
    """The architecture; plugins add more."""
    width: int | None = Field(default=None, ge=4, le=1024)
    """Channels of the first layer; default: that of the weights file, else the paper's 64."""
    stem: Stem | None = None
    """The first layer. cifar: 3x3 at full resolution; imagenet: 7x7 with stride 2, and pooling; default: that of the
    weights file, else cifar."""
    freeze: str | None = None
    """The last frozen block (stem, layer1.0 ... layer4.1), an entire layer, none, or auto: chosen by an analysis of
    device 0's stream before the run (docs/results/generalizability.md); default: the method's own."""
    freeze_threshold: float = Field(default=0.94, ge=0, le=1)
    """With `freeze: auto`: the memory stability and learning plasticity that a block needs to be frozen."""
    analysis_epochs: int = Field(default=5, ge=1, le=1_000_000)
    """Epochs per task of the analysis; no more than `training.epochs`."""
    frozen_batch_norm: Literal["eval", "train"] | None = None
    """eval: frozen too (ours); train: batch statistics that drift (the paper's code); default: the method's own."""
    weights: str = "builtin"
    """builtin (width 20, Tiny-ImageNet at 32x32), imagenet (torchvision, width 64), none, or a safetensors file."""
