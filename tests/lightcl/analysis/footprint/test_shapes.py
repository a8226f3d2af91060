"""Shapes read off real networks."""

import pytest
import torch

from lightcl.analysis.footprint.shapes import shape_of
from lightcl.networks.pruning import prune_
from tests.lightcl import toys


def test_blocks_by_hand():
    """Width 4 on 8x8: the stem gives 4x8x8; layer2.0 goes to 8x4x4 with a shortcut convolution."""
    shape = shape_of(toys.network(freeze="layer1"), (3, 8, 8))
    stem, layer2 = shape.blocks[0], shape.blocks[3]
    assert (stem.first.inputs, stem.first.outputs) == (3 * 8 * 8, 4 * 8 * 8)
    assert (stem.first.weights, stem.first.macs) == (4 * 3 * 9, 4 * 3 * 9 * 64)
    assert (layer2.name, layer2.frozen, layer2.outputs) == ("layer2.0", False, 8 * 4 * 4)
    assert layer2.shortcut is not None
    assert (layer2.shortcut.weights, layer2.shortcut.macs) == (8 * 4, 8 * 4 * 16)
    assert layer2.maps == 2 * 8 * 4 * 4
    assert [b.name for b in shape.frozen] == ["stem", "layer1.0", "layer1.1"]
    assert shape.features == 4 * 8 * 8


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("freeze", ["none", "stem", "layer3", "layer4"])
def test_shapes_are_those_of_the_forward_pass(stem, pruned, freeze):
    network = toys.network(stem=stem, freeze=freeze)
    if pruned:
        prune_(network, {"layer1": 0.25, "layer3": 0.7, "layer4": 0.8})
    shape = shape_of(network, (3, 38, 32))
    assert shape.parameters == sum(p.numel() for p in network.parameters())
    assert shape.trained_parameters == sum(p.numel() for p in network.parameters() if p.requires_grad)
    given, x = [], toys.images(1, size=38)[:, :, :, :32]
    with torch.no_grad():
        for name in network.block_names:
            x = network.run_block(name, x)
            given.append(x.numel())
    assert [b.outputs for b in shape.blocks] == given
