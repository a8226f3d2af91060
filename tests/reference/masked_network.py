"""LightCL's sparse variant as in its paper: the entire network, with removed channels masked to zero.

Written for ResNet-18 (two blocks a layer) block by block, without lightcl/pruning.py's table of channel sets.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightcl.networks.resnet import StagedResNet


def mask_(network: StagedResNet, kept: Mapping[str, Tensor]) -> None:
    """Zeroes whatever a removed channel has: its filters, batch-norm's scale and shift, the filters that read it.

    `kept` holds the indices that stay: of layer k's residual stream under "layer{k}", of what is inside a block under
    the name of its first convolution. Batch-norm gives 0·(x - μ)/σ + 0 = 0 for a masked channel in either mode, ReLU
    and the shortcut leave it there, and all its gradients are 0, so training with SGD keeps it masked.
    """
    with torch.no_grad():
        stream = kept["layer1"]
        _mask_outputs(network.conv1, network.bn1, stream)
        for layer in (1, 2, 3, 4):
            into, stream = stream, kept[f"layer{layer}"]
            for number in (0, 1):
                name = f"layer{layer}.{number}"
                block = network.get_submodule(name)
                _mask_inputs(block.conv1, into)
                _mask_outputs(block.conv1, block.bn1, kept[f"{name}.conv1"])
                _mask_inputs(block.conv2, kept[f"{name}.conv1"])
                _mask_outputs(block.conv2, block.bn2, stream)
                if block.downsample is not None:
                    _mask_inputs(block.downsample[0], into)
                    _mask_outputs(block.downsample[0], block.downsample[1], stream)
                into = stream
        _mask_inputs(network.fc, stream)


def _removed(count: int, kept: Tensor) -> list[int]:
    return [c for c in range(count) if c not in kept.tolist()]


def _mask_outputs(convolution: nn.Conv2d, norm: nn.BatchNorm2d, kept: Tensor) -> None:
    for c in _removed(convolution.out_channels, kept):
        convolution.weight[c] = 0
        norm.weight[c] = norm.bias[c] = 0


def _mask_inputs(module: nn.Conv2d | nn.Linear, kept: Tensor) -> None:
    for c in _removed(module.weight.shape[1], kept):
        module.weight[:, c] = 0
