"""Folds batch-norm in evaluation mode, one scale and one shift per channel, into the convolution before it."""

from __future__ import annotations

import copy

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from lightcl.networks.staged import Backbone, Stage


def folded(network: Backbone) -> Stage:
    """A copy of the network's frozen prefix whose batch-norms are part of its convolutions.

    The outputs are equal up to rounding. Every batch-norm that follows a convolution (`ChannelSet.norms`) becomes an
    identity. Raises ValueError where the prefix's batch-norm is in training mode: it has no fixed scale.
    """
    if network.frozen_batch_norm != "eval":
        raise ValueError("the prefix's batch-norm is in training mode and cannot be folded")
    # In a deepcopy, the blocks and the named modules are still the same objects.
    stage = copy.deepcopy(network.prefix)
    pairs = [pair for s in network.channel_sets() for pair in zip(s.writers, s.norms, strict=True)]
    for writer, norm_name in pairs:
        if not _has(stage, writer):
            continue
        convolution, norm = stage.get_submodule(writer), stage.get_submodule(norm_name)
        assert isinstance(convolution, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        convolution.weight, convolution.bias = fuse_conv_bn_weights(
            convolution.weight, convolution.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        _replace_(stage, norm, nn.Identity())
    for parameter in stage.parameters():
        parameter.requires_grad_(False)
    stage.batch_norms = ()
    return stage


def _has(stage: Stage, name: str) -> bool:
    return any(found == name for found, _ in stage.named_modules())


def _replace_(stage: Stage, old: nn.Module, new: nn.Module) -> None:
    """Replaces `old` everywhere in the stage: under its name and inside its blocks."""
    for part in (stage, *stage.block_modules):
        for module in list(part.modules()):
            for name, child in list(module.named_children()):
                if child is old:
                    setattr(module, name, new)
