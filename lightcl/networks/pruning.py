"""Physical removal of channels: a smaller dense network instead of a large one full of zeros.

LightCL (arXiv 2407.10545), the sparse variant: each layer loses a share of its output channels once, before the first
task: those whose weights have the smallest mean. A channel removed from one layer is removed from the inputs of the
next. The paper masks weights to zero. Here convolutions, batch-norms and the head's inputs become smaller, and so do
memory, time, state and messages; `tests/reference/masked_network.py` is the masked form and gives the same outputs.

Deviations: convolutions whose outputs are added at a shortcut must keep the same channels, so they are scored together
(`channel_scores`). The score is the signed mean, as the paper writes it (`score: mean`), or the mean magnitude (`score:
magnitude`, the usual filter criterion: Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017). Batch-norm is
sliced like the weights; its statistics are not re-estimated, since that would take data, and the prefix must be equal
on all devices.

The backbone says which channels belong together (`Backbone.channel_sets`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from lightcl.errors import RequestError, nearest
from lightcl.networks.staged import Backbone, ChannelSet

Score = Literal["mean", "magnitude"]


def channel_scores(network: Backbone, channels: ChannelSet, score: Score = "mean") -> Tensor:
    """`[C]`, float64: the mean of the weights (or of their magnitudes) that produce each channel of a set.

    Where several convolutions produce it, the mean is over the weights of all of them, so each counts by its size.
    """
    weights = torch.cat([_convolution(network, name).weight.detach().flatten(1) for name in channels.writers], dim=1)
    return (weights.abs() if score == "magnitude" else weights).mean(1, dtype=torch.float64)


def choose_channels(network: Backbone, sparsity: Mapping[str, float], score: Score = "mean") -> dict[str, Tensor]:
    """The channels to keep, ascending, by channel set.

    `sparsity` is the share of channels to remove, by layer (0 where a layer is not named). Every set of the layer loses
    the `int(C * share + 0.5)` channels with the lowest score, at equal scores those with the lower index. float64 and a
    stable order make the choice the same on every machine. Raises RequestError for a layer that the network does not
    have and where no channel would be left.
    """
    for layer, share in sparsity.items():
        if layer not in network.layer_names:
            raise RequestError(
                f"method.channel_sparsity.{layer}: this network has no such layer{nearest(layer, network.layer_names)} "
                f"(allowed: {', '.join(network.layer_names)}; the stem has the channels of layer1)"
            )
        if not 0 <= share < 1:
            raise RequestError(f"method.channel_sparsity.{layer} is {share}; allowed: 0 up to, but not including, 1")
    kept = {}
    for channels in network.channel_sets():
        scores = channel_scores(network, channels, score)
        share = sparsity.get(channels.layer, 0.0)
        removed = int(scores.numel() * share + 0.5)
        if removed >= scores.numel():
            raise RequestError(
                f"method.channel_sparsity.{channels.layer}: {share} of the {scores.numel()} channels of "
                f"{channels.name} leaves none; lower it, or use a wider network"
            )
        kept[channels.name] = scores.sort(stable=True).indices[removed:].sort().values
    return kept


def prune_(network: Backbone, sparsity: Mapping[str, float], score: Score = "mean") -> None:
    """Removes channels as `choose_channels` says, and records the kept ones in `network.kept_channels`."""
    keep_channels_(network, choose_channels(network, sparsity, score))


def keep_channels_(network: Backbone, kept: Mapping[str, Tensor]) -> None:
    """Shrinks the network to the channels `kept` (indices among its present ones, by channel set).

    The parameters are new objects, so create an optimizer afterwards. Frozen parameters stay frozen.
    """
    for channels in network.channel_sets():
        index = kept[channels.name]
        for name in channels.writers:
            convolution = _convolution(network, name)
            _slice_(convolution, "weight", index, 0)
            convolution.out_channels = len(index)
        for name in channels.norms:
            norm = network.get_submodule(name)
            for tensor in ("weight", "bias", "running_mean", "running_var"):
                _slice_(norm, tensor, index, 0)
            norm.num_features = len(index)  # type: ignore[assignment]
        for name in channels.readers:
            reader = network.get_submodule(name)
            _slice_(reader, "weight", index, 1)
            setattr(reader, "in_features" if isinstance(reader, nn.Linear) else "in_channels", len(index))
        before = network.kept_channels.get(channels.name)
        network.kept_channels[channels.name] = index.clone() if before is None else before[index]


def channel_digest(network: Backbone) -> str:
    """Digest of the remaining channels: equal for two networks of one width exactly if they kept the same channels."""
    total = hashlib.sha256()
    for channels in network.channel_sets():
        count = _convolution(network, channels.writers[0]).out_channels
        kept = network.kept_channels.get(channels.name, torch.arange(count))
        total.update(f"{channels.name} {kept.tolist()}\n".encode())
    return total.hexdigest()[:16]


def _convolution(network: Backbone, name: str) -> nn.Conv2d:
    module = network.get_submodule(name)
    assert isinstance(module, nn.Conv2d)
    return module


def _slice_(module: nn.Module, name: str, index: Tensor, dim: int) -> None:
    """Replaces a parameter or buffer by some of its slices; memory format and `requires_grad` stay."""
    full: Tensor = getattr(module, name)
    part = full.detach().index_select(dim, index.to(full.device))
    if full.ndim == 4 and full.is_contiguous(memory_format=torch.channels_last):
        part = part.contiguous(memory_format=torch.channels_last)
    setattr(module, name, nn.Parameter(part, full.requires_grad) if isinstance(full, nn.Parameter) else part)
