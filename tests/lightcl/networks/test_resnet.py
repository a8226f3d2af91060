"""The staged network: torchvision's names and numbers, the freeze point, what frozen means, feature maps."""

import copy
import gc
import weakref

import pytest
import torch
import torchvision
from torch.nn import functional as F

from lightcl.errors import RequestError
from lightcl.networks.resnet import IMAGENET_MEAN, IMAGENET_STD, StagedResNet
from tests.lightcl import toys

BLOCKS = (
    "stem", "layer1.0", "layer1.1", "layer2.0", "layer2.1", "layer3.0", "layer3.1", "layer4.0", "layer4.1",
)  # fmt: skip
BOUNDARIES = {"none": 0, "layer1": 3, "layer2": 5, "layer3": 7, "layer4": 9} | {b: i + 1 for i, b in enumerate(BLOCKS)}


@pytest.fixture(scope="module")
def torchvisions() -> torchvision.models.ResNet:
    """torchvision's ResNet-18 with random weights and random batch-norm statistics."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = torchvision.models.resnet18(weights=None, num_classes=7)
        toys.randomise_norms_(model)
    return model


@pytest.fixture
def twin(torchvisions: torchvision.models.ResNet) -> StagedResNet:
    """Ours with the same weights."""
    network = StagedResNet(width=64, classes=7, stem="imagenet", freeze="none")
    network.load_state_dict(torchvisions.state_dict())
    return network


def normalized(images: torch.Tensor) -> torch.Tensor:
    return torchvision.transforms.functional.normalize(images.float() / 255, IMAGENET_MEAN, IMAGENET_STD)


@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
def test_names_in_the_state_dict_are_torchvisions(stem, torchvisions):
    assert list(toys.network(stem=stem).state_dict()) == list(torchvisions.state_dict())


def test_torchvisions_weights_give_torchvisions_logits(torchvisions, twin):
    images = toys.images(2, size=64)
    with torch.no_grad():
        expected = torchvisions.eval()(normalized(images))
        torch.testing.assert_close(twin.eval()(images), expected, rtol=1e-4, atol=1e-4)


def test_gradients_and_statistics_of_a_training_step_are_torchvisions(torchvisions, twin):
    """The in-place operations of our block must not spoil what the backward pass needs."""
    images, labels = toys.images(3, size=64), torch.tensor([0, 4, 6])
    other = torchvision.models.resnet18(weights=None, num_classes=7)
    other.load_state_dict(torchvisions.state_dict())
    F.cross_entropy(other.train()(normalized(images)), labels).backward()
    F.cross_entropy(twin.train()(images), labels).backward()
    expected = {name: parameter.grad for name, parameter in other.named_parameters()}
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-4, msg=name)
    torch.testing.assert_close(twin.state_dict()["layer4.1.bn2.running_var"], other.layer4[1].bn2.running_var)


@pytest.mark.parametrize(("point", "frozen"), BOUNDARIES.items())
def test_network_is_cut_after_the_freeze_point(point, frozen):
    network = toys.network(freeze=point)
    assert network.prefix.blocks == BLOCKS[:frozen]
    assert network.suffix.blocks == BLOCKS[frozen:]
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    in_suffix = {name for name, _ in network.named_parameters() if name in network.suffix.state_dict()}
    assert trained == in_suffix | {"fc.weight", "fc.bias"}
    names = [*network.prefix.state_dict(), *network.suffix.state_dict(), "fc.weight", "fc.bias"]
    assert names == list(network.state_dict())


@pytest.mark.parametrize("point", BOUNDARIES)
def test_freeze_point_does_not_change_the_function(point):
    network, images = toys.network(freeze="none").eval(), toys.images(2)
    with torch.no_grad():
        expected = network(images)
        network.freeze(point)
        assert torch.equal(network(images), expected)


@pytest.mark.parametrize(
    ("point", "hint"), [("layer5", "layer"), ("layer4.2", "layer4."), ("fc", "layer4.1"), ("layer1.7", "layer1.")]
)
def test_freeze_point_beyond_the_network_is_refused(point, hint):
    with pytest.raises(RequestError, match=rf"network.freeze '{point}' is not a block of this network.*{hint}"):
        toys.network(freeze=point)


def test_freezing_again_elsewhere_thaws_what_is_no_longer_frozen():
    network = toys.network(freeze="layer3").train()
    network.freeze("layer1")
    assert network.layer2[0].bn1.training
    assert network.layer2[0].conv1.weight.requires_grad
    assert not network.layer1[0].bn1.training
    assert not network.layer1[0].conv1.weight.requires_grad


@pytest.mark.parametrize(("mode", "frozen_trains"), [("eval", False), ("train", True)])
def test_mode_of_frozen_batch_norm(mode, frozen_trains):
    network = toys.network(freeze="layer3", frozen_batch_norm=mode).train()
    assert network.layer3[1].bn2.training is frozen_trains
    assert network.bn1.training is frozen_trains
    assert network.layer4[0].bn1.training
    network.eval()
    assert not any(module.training for module in network.modules())


def test_other_depths_keep_the_scheme_of_names():
    network = toys.network(blocks_per_layer=(1, 2), freeze="layer1")
    assert network.block_names == ("stem", "layer1.0", "layer2.0", "layer2.1")
    assert network.suffix.blocks == ("layer2.0", "layer2.1")
    assert network(toys.images(2)).shape == (2, 4)


def test_prefix_outputs_carry_no_graph_and_lead_to_the_logits():
    network, images = toys.network(freeze="layer3").eval(), toys.images(2)
    features = network.features(images)
    assert not features.requires_grad
    assert features.shape == (2, 16, 2, 2)
    assert torch.equal(network.classify(features), network(images))


def test_with_nothing_frozen_the_images_themselves_enter_the_suffix():
    network, images = toys.network(freeze="none"), toys.images(2)
    assert network.features(images) is images


@pytest.mark.parametrize("point", ["none", "layer2.0", "layer3", "layer4.0"])
def test_feature_maps_are_named_after_their_blocks(point):
    network, maps = toys.network(freeze=point).eval(), {}
    with torch.no_grad():
        network.classify(network.features(toys.images(2)), maps.__setitem__)
    assert tuple(maps) == network.suffix.map_names
    blocks = [block for block in BLOCKS[BOUNDARIES[point] :] if block != "stem"]
    assert list(maps) == [f"{block}.relu{i}" for block in blocks for i in (1, 2)]


def test_resnet18s_suffix_has_the_papers_four_maps():
    maps = {}
    network = toys.network(freeze="layer3").eval()
    with torch.no_grad():
        network.classify(network.features(toys.images(2, size=16)), maps.__setitem__)
    assert {name: tuple(m.shape) for name, m in maps.items()} == {
        "layer4.0.relu1": (2, 32, 2, 2),
        "layer4.0.relu2": (2, 32, 2, 2),
        "layer4.1.relu1": (2, 32, 2, 2),
        "layer4.1.relu2": (2, 32, 2, 2),
    }


def test_feature_maps_are_the_outputs_of_both_convolutions_after_relu():
    network, maps = toys.network(freeze="layer4.0").eval(), {}
    with torch.no_grad():
        before = network.features(toys.images(2))
        network.classify(before, maps.__setitem__)
        block = network.layer4[1]
        first = F.relu(block.bn1(block.conv1(before)))
        second = F.relu(block.bn2(block.conv2(first)) + before)
        assert torch.equal(maps["layer4.1.relu1"], first)
        assert torch.equal(maps["layer4.1.relu2"], second)


def test_bytes_and_unit_floats_are_the_same_images():
    network, images = toys.network().eval(), toys.images(2)
    with torch.no_grad():
        assert torch.equal(network(images), network(images.float() / 255))
        torch.testing.assert_close(network.input_stem.normalize(images), normalized(images))


def test_images_are_not_changed_by_the_network():
    network, images = toys.network(), toys.images(2)
    before = images.clone()
    network(images)
    assert torch.equal(images, before)


def test_gray_images_are_normalized_by_the_mean_over_colors():
    # mean (0.485 + 0.456 + 0.406)/3 = 0.449, deviation (0.229 + 0.224 + 0.225)/3 = 0.226: (1 - 0.449)/0.226 = 2.43805
    network = toys.network(in_channels=1)
    white = torch.full((1, 1, 8, 8), 255, dtype=torch.uint8)
    torch.testing.assert_close(network.input_stem.normalize(white), torch.full((1, 1, 8, 8), 2.43805))
    assert network(white.expand(2, 1, 8, 8)).shape == (2, 4)


def test_a_stage_contains_the_networks_own_modules():
    network = toys.network(freeze="layer3").eval()
    for stage in (network.prefix, network.suffix):
        assert isinstance(stage, torch.nn.Module)
        own = network.state_dict()
        assert all(tensor.data_ptr() == own[name].data_ptr() for name, tensor in stage.state_dict().items())
    assert {name for name, _ in network.suffix.named_parameters()} == {
        name for name, _ in network.named_parameters() if name.startswith("layer4")
    }
    images = toys.images(2)
    with torch.no_grad():
        exported = torch.jit.trace(network.prefix, images)
        assert torch.equal(exported(images), network.features(images))


def test_a_stage_does_not_keep_its_network_alive():
    network = toys.network()
    alive, suffix = weakref.ref(network), network.suffix
    gc.disable()
    try:
        del network
        assert alive() is None
    finally:
        gc.enable()
    assert len(suffix.state_dict()) > 0


def test_a_copied_network_has_its_own_stages():
    network = toys.network().eval()
    other, images = copy.deepcopy(network), toys.images(2)
    with torch.no_grad():
        expected = network(images)
        for parameter in network.parameters():
            parameter.zero_()
        assert torch.equal(other(images), expected)


def test_maps_come_in_the_order_of_the_forward_pass_and_only_when_asked_for():
    network, came = toys.network(freeze="layer2").eval(), []
    with torch.no_grad():
        features = network.features(toys.images(2), lambda name, feature_map: came.append((name, feature_map.shape[1])))
        network.classify(features)
    assert came == [(name, network.map_channels(name)) for name in network.prefix.map_names]


@pytest.mark.parametrize("name", BLOCKS)
def test_channels_of_a_block_are_those_of_its_output(name):
    network, x = toys.network().eval(), toys.images(2)
    with torch.no_grad():
        for block in BLOCKS[: BLOCKS.index(name) + 1]:
            x = network.run_block(block, x)
    assert network.block_channels(name) == x.shape[1]
