"""Channel removal: which channels go, that the rest computes what a masked network would, and how small it gets."""

import copy

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightcl.assembly import build_network
from lightcl.errors import RequestError
from lightcl.exchange.tensors import outgoing, size_in_bytes
from lightcl.methods.lightcl_sparse import PAPER_SPARSITY
from lightcl.networks.pruning import (
    channel_digest,
    channel_scores,
    choose_channels,
    keep_channels_,
    prune_,
)
from lightcl.networks.resnet import StagedResNet
from tests.lightcl import toys
from tests.reference.masked_network import mask_


def shipped() -> StagedResNet:
    """The built-in weights, width 20."""
    return build_network(toys.scenario(network={"weights": "builtin", "width": None}), in_channels=3, classes=10)


def width_8() -> StagedResNet:
    return toys.network(width=8, classes=5)


def set_named(network: StagedResNet, name: str):
    return next(channels for channels in network.channel_sets() if channels.name == name)


def twins(network: StagedResNet) -> tuple[StagedResNet, StagedResNet]:
    """Pruned as in the paper, and masked."""
    masked = copy.deepcopy(network)
    prune_(network, PAPER_SPARSITY)
    mask_(masked, network.kept_channels)
    return network, masked


# -- scores --------------------------------------------------------------------------------------------------------


def fill_(network: StagedResNet, name: str, means: list[float]) -> None:
    """Gives output channel c of a convolution weights around means[c]: every other one 1 above, the next 1 below."""
    weight = network.get_submodule(name).weight
    signs = torch.ones(weight[0].numel())
    signs[1::2] = -1  # an even number of weights, or the mean would not be means[c]
    assert len(signs) % 2 == 0
    with torch.no_grad():
        for c, mean in enumerate(means):
            weight[c] = (mean + signs).view_as(weight[c])


def test_a_channels_score_is_the_mean_of_its_weights():
    network = toys.network()
    fill_(network, "layer1.0.conv1", [0.5, -0.25, 0.0, 2.0])
    inner = set_named(network, "layer1.0.conv1")
    assert channel_scores(network, inner).tolist() == [0.5, -0.25, 0.0, 2.0]
    # half of the weights are |m + 1|, half |m - 1|: (1.5 + 0.5) / 2, (0.75 + 1.25) / 2, (1 + 1) / 2, (3 + 1) / 2
    assert channel_scores(network, inner, "magnitude").tolist() == [1.0, 1.0, 1.0, 2.0]
    assert choose_channels(network, {"layer1": 0.5})["layer1.0.conv1"].tolist() == [0, 3]  # -0.25 and 0 are the lowest
    # of three equals the lower indices go first
    assert choose_channels(network, {"layer1": 0.5}, "magnitude")["layer1.0.conv1"].tolist() == [2, 3]


def test_channels_of_a_shortcut_are_scored_over_all_convolutions_that_write_them():
    """Width 4: a channel of layer2 (8) has 4 weights in the 1x1 shortcut and 8·9 = 72 in each of two convolutions."""
    network = toys.network()
    stream = set_named(network, "layer2")
    assert stream.writers == ("layer2.0.downsample.0", "layer2.0.conv2", "layer2.1.conv2")
    first, rest = [1.0, -1.0, 0.0], [0.0] * 5
    fill_(network, "layer2.0.downsample.0", [37.0, 0.0, 0.0, *rest])
    fill_(network, "layer2.0.conv2", [*first, *rest])
    fill_(network, "layer2.1.conv2", [0.0, 0.0, 0.5, *rest])
    expected = [(4 * 37 + 72 * 1) / 148, -72 / 148, 36 / 148, *rest]
    torch.testing.assert_close(channel_scores(network, stream), torch.tensor(expected, dtype=torch.float64))


def test_layer1_shares_its_channels_with_the_stem():
    stream = set_named(toys.network(), "layer1")
    assert stream.writers == ("conv1", "layer1.0.conv2", "layer1.1.conv2")
    assert stream.norms == ("bn1", "layer1.0.bn2", "layer1.1.bn2")
    assert stream.readers == ("layer1.0.conv1", "layer1.1.conv1", "layer2.0.conv1", "layer2.0.downsample.0")


def test_every_convolution_is_written_once_and_read_once():
    """Otherwise a channel would be removed on one side only."""
    network = toys.network()
    convolutions = {name for name, module in network.named_modules() if isinstance(module, torch.nn.Conv2d)}
    norms = {name for name, module in network.named_modules() if isinstance(module, torch.nn.BatchNorm2d)}
    sets = network.channel_sets()
    assert sorted(n for s in sets for n in s.writers) == sorted(convolutions)
    assert sorted(n for s in sets for n in s.norms) == sorted(norms)
    assert sorted(n for s in sets for n in s.readers) == sorted(convolutions - {"conv1"} | {"fc"})


@pytest.mark.parametrize(
    ("sparsity", "reason"),
    [
        ({"layer5": 0.5}, r"channel_sparsity\.layer5: .*no such layer, did you mean 'layer.'\? \(allowed: layer1"),
        ({"stem": 0.5}, "the stem has the channels of layer1"),
        ({"layer4": 1.0}, r"layer4 is 1\.0; allowed: 0 up to"),
        ({"layer1": 0.9}, "0.9 of the 4 channels of layer1 leaves none"),  # int(3.6 + 0.5) = 4
    ],
)
def test_impossible_sparsity_is_refused_and_changes_nothing(sparsity, reason):
    network = toys.network()
    with pytest.raises(RequestError, match=reason):
        prune_(network, sparsity)
    toys.assert_same(network.state_dict(), toys.network().state_dict())
    assert network.kept_channels == {}


# -- the masked twin -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [width_8, shipped])
@pytest.mark.parametrize("training", [False, True])
def test_outputs_are_those_of_the_masked_network(make, training):
    whole, images = make(), toys.images(8, size=32)
    pruned, masked = twins(copy.deepcopy(whole))
    maps: dict[str, Tensor] = {}
    masked_maps: dict[str, Tensor] = {}
    with torch.no_grad():
        for network in (whole, pruned, masked):
            network.freeze("none" if training else "layer3")
            network.train(training)
        given = pruned.classify(pruned.features(images), maps.__setitem__)
        expected = masked.classify(masked.features(images), masked_maps.__setitem__)
        assert not torch.allclose(whole(images), expected, atol=0.01), "removing channels must show"
    torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5)
    for name, feature_map in maps.items():
        key = name.replace("relu1", "conv1") if name.endswith("relu1") else name.split(".")[0]
        torch.testing.assert_close(feature_map, masked_maps[name][:, pruned.kept_channels[key]], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("make", [width_8, shipped])
@pytest.mark.parametrize("freeze", ["layer3", "none"])
def test_training_steps_are_those_of_the_masked_network(make, freeze):
    """Gradients, three steps of SGD and the batch-norm statistics; what was masked stays masked."""
    network = make()
    network.freeze(freeze)
    pruned, masked = twins(network.double())  # fp32 rounding, amplified by batch-norm, would hide small errors
    images, labels = toys.images(8, size=16).double() / 255, torch.tensor([0, 1, 2, 3, 4, 3, 2, 1])
    for network in (pruned, masked):
        optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.05)
        network.train()
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(network(images), labels).backward()
            optimizer.step()
    removed = {name: tensor.clone() for name, tensor in masked.state_dict().items()}
    kept = pruned.kept_channels
    keep_channels_(masked, kept)
    for name, tensor in pruned.state_dict().items():
        torch.testing.assert_close(tensor, masked.state_dict()[name], rtol=1e-7, atol=1e-9, msg=name)
    grads = {name: p.grad for name, p in pruned.named_parameters() if p.grad is not None}
    assert set(grads) == {name for name, p in pruned.named_parameters() if p.requires_grad}
    assert all(grad.abs().max() > 0 for grad in grads.values())
    gone = [c for c in range(removed["fc.weight"].shape[1]) if c not in kept["layer4"]]
    assert removed["layer4.1.conv2.weight"][gone].abs().max() == 0
    assert removed["layer4.1.bn2.bias"][gone].abs().max() == 0
    assert removed["fc.weight"][:, gone].abs().max() == 0


# -- the smaller network -------------------------------------------------------------------------------------------


def test_the_papers_shares_remove_nine_tenths_of_the_papers_network():
    network = StagedResNet(width=64, classes=10)
    before = sum(p.numel() for p in network.parameters())
    prune_(network, PAPER_SPARSITY)
    kept = {name: len(index) for name, index in network.kept_channels.items()}
    # 64 - int(12.8 + 0.5), 128 - int(25.6 + 0.5), 256 - int(179.2 + 0.5), 512 - int(409.6 + 0.5)
    sizes = {"layer1": 51, "layer2": 102, "layer3": 77, "layer4": 102}
    assert kept == {name: sizes[name.split(".")[0]] for name in kept}
    assert len(kept) == 12
    after = sum(p.numel() for p in network.parameters())
    assert (before, after) == (11_173_962, 1_030_362)
    assert 1 - after / before == pytest.approx(0.908, abs=0.001)


def test_pruned_modules_report_their_sizes():
    network = toys.network(width=8)
    names = list(network.state_dict())
    prune_(network, PAPER_SPARSITY)
    assert list(network.state_dict()) == names
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            assert (module.out_channels, module.in_channels) == tuple(module.weight.shape[:2])
        elif isinstance(module, torch.nn.BatchNorm2d):
            assert {module.num_features} == {t.numel() for t in (module.weight, module.bias, module.running_mean)}
    assert network.fc.in_features == network.fc.weight.shape[1] == 64 - int(64 * 0.8 + 0.5)


def test_frozen_stays_frozen_and_memory_format_stays():
    network = toys.network(width=8, freeze="layer2").to(memory_format=torch.channels_last)
    trained = [name for name, p in network.named_parameters() if p.requires_grad]
    prune_(network, PAPER_SPARSITY)
    assert [name for name, p in network.named_parameters() if p.requires_grad] == trained
    assert network.layer3[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)


def test_pruned_twice_still_knows_the_original_channels():
    network, first, second = toys.network(), {}, {}
    for channels in network.channel_sets():
        count = network.get_submodule(channels.writers[0]).out_channels
        first[channels.name], second[channels.name] = torch.arange(1, count), torch.arange(0, count - 1, 2)
    keep_channels_(network, first)
    keep_channels_(network, second)
    assert network.kept_channels["layer1"].tolist() == [1, 3]
    assert network.kept_channels["layer2.0.conv1"].tolist() == [1, 3, 5, 7]


def test_digest_distinguishes_channel_sets():
    pruned, again, other, whole = (toys.network(seed=seed) for seed in (0, 0, 1, 0))
    for network in (pruned, again, other):
        prune_(network, PAPER_SPARSITY)
    assert channel_digest(pruned) == channel_digest(again)
    assert [t.shape for t in other.parameters()] == [t.shape for t in pruned.parameters()]
    assert channel_digest(other) != channel_digest(pruned)
    assert channel_digest(whole) == channel_digest(toys.network(seed=1)) != channel_digest(pruned)


def test_removing_no_channels_keeps_the_network():
    network = toys.network()
    prune_(network, {})
    toys.assert_same(network.state_dict(), toys.network().state_dict())
    assert channel_digest(network) == channel_digest(toys.network())


def test_messages_are_a_twentieth_with_the_papers_shares():
    """Suffix of width 20, its statistics included; layer4 has 0.2 of its outputs, and of its inputs but the first."""
    whole = shipped()
    pruned, _ = twins(shipped())
    ratio = size_in_bytes(outgoing(pruned, "suffix")) / size_in_bytes(outgoing(whole, "suffix"))
    assert ratio < 0.05
