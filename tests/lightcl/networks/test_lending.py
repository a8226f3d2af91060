from collections.abc import Callable

import pytest
import torch
from torch import nn

from lightcl.networks.lending import NetworkLender
from lightcl.networks.pruning import prune_
from lightcl.networks.resnet import StagedResNet
from lightcl.networks.staged import Backbone
from lightcl.networks.winograd import use_winograd_


def template() -> Backbone:
    network = StagedResNet(width=8, classes=4)
    network.freeze("layer3")
    return network


def train_(network: Backbone, bf16: bool = False) -> None:
    network.train()
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        network(torch.rand(4, 3, 32, 32)).sum().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    network.eval()


@pytest.mark.parametrize("bf16", [False, True])
def test_the_next_device_gets_the_same_object_set_back_to_the_template(bf16: bool) -> None:
    start = template()
    lender = NetworkLender(start, again=True)
    with lender.lent() as first:
        train_(first, bf16)
        assert not torch.equal(first.head.weight, start.head.weight)
    with lender.lent() as second:
        assert second is first
        assert second.training == start.training
        images = torch.rand(2, 3, 32, 32)
        assert torch.equal(second(images), start(images))
        assert all(torch.equal(t, start.state_dict()[n]) for n, t in second.state_dict().items())


def test_two_loans_at_once_are_two_networks_with_one_prefix() -> None:
    lender = NetworkLender(template(), again=True)
    with lender.lent() as one, lender.lent() as other:
        assert one is not other
        assert one.head.weight is not other.head.weight
        assert next(one.prefix.parameters()) is next(other.prefix.parameters())


def test_statistics_that_move_are_not_shared() -> None:
    network = StagedResNet(width=8, classes=4, frozen_batch_norm="train")
    network.freeze("layer3")
    lender = NetworkLender(network, again=True)
    with lender.lent() as first:
        train_(first)
    with lender.lent() as second:
        assert second is first
        assert all(torch.equal(t, network.state_dict()[n]) for n, t in second.state_dict().items())


def test_without_again_every_loan_is_a_copy() -> None:
    lender = NetworkLender(template(), again=False)
    with lender.lent() as first:
        pass
    with lender.lent() as second:
        assert second is not first


def leave_gradients(network: Backbone) -> None:
    network.train()
    network(torch.rand(4, 3, 32, 32)).sum().backward()


def add_column(network: Backbone) -> None:
    network.add_module("column", nn.Linear(2, 2))


def change_setting(network: Backbone) -> None:
    network.get_submodule("layer4.0.conv1").stride = (3, 3)  # type: ignore[assignment]


@pytest.mark.parametrize(
    "change",
    [
        lambda network: prune_(network, {"layer4": 0.5}),
        lambda network: use_winograd_(network.suffix),
        lambda network: network.head.register_forward_hook(lambda *_: None),
        lambda network: network.head.weight.register_post_accumulate_grad_hook(lambda _: None),
        lambda network: network.head.weight.requires_grad_(False),
        leave_gradients,
        add_column,
        change_setting,
    ],
)
def test_a_network_of_another_form_is_not_lent_again(change: Callable[[Backbone], object]) -> None:
    lender = NetworkLender(template(), again=True)
    with lender.lent() as first:
        change(first)
    with lender.lent() as second:
        assert second is not first


def test_after_an_exception_it_stays_away() -> None:
    lender = NetworkLender(template(), again=True)
    with pytest.raises(RuntimeError), lender.lent() as first:
        raise RuntimeError
    with lender.lent() as second:
        assert second is not first
