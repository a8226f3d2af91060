"""Batch-norm folded into the frozen convolutions."""

import pytest
import torch
from torch import nn

from lightcl.networks.folding import folded
from tests.lightcl import toys


@pytest.mark.parametrize("freeze", ["stem", "layer1", "layer3", "layer4"])
@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_the_folded_prefix_gives_the_same_features(freeze, stem):
    network = toys.network(freeze=freeze, stem=stem).eval()
    before = toys.copy_of(network.state_dict())
    stage = folded(network)
    images = toys.images(5, size=32)
    expected = network.features(images)
    assert torch.allclose(stage(images), expected, rtol=1e-4, atol=1e-5)
    assert not any(isinstance(module, nn.BatchNorm2d) for block in stage.block_modules for module in block.modules())
    assert not any(parameter.requires_grad for parameter in stage.parameters())
    toys.assert_same(network.state_dict(), before)


def test_a_folded_convolution_by_hand():
    """Weight 3, running mean 5, variance 4, scale 2, shift 1: y = (3x - 5) / 2 * 2 + 1 = 3x - 4."""
    network = toys.network(freeze="stem").eval()
    network.bn1.eps = 0.0
    with torch.no_grad():
        network.conv1.weight.zero_()
        network.conv1.weight[0, 0, 1, 1] = 3.0
        for buffer, value in ((network.bn1.running_mean, 5), (network.bn1.running_var, 4)):
            buffer[0] = value
        network.bn1.weight[0], network.bn1.bias[0] = 2.0, 1.0
    convolution = folded(network).get_submodule("conv1")
    assert convolution.weight[0, 0, 1, 1].item() == 3.0
    assert convolution.bias[0].item() == -4.0


def test_batch_norm_in_training_mode_is_not_folded():
    with pytest.raises(ValueError, match="training mode"):
        folded(toys.network(freeze="layer3", frozen_batch_norm="train"))
