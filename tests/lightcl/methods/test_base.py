"""What all methods share: the classes in the cross-entropy."""

import math

import pytest
import torch

from lightcl.methods.base import METHODS, PrefixFeatures
from lightcl.methods.sgd import SGDParameters
from tests.lightcl import toys

LOGITS = torch.tensor([[0.0, math.log(3), math.log(2), math.log(4)]])  # exp: 1, 3, 2, 4
SECOND = toys.context(1, [1, 2], seen=[0, 1, 2])


@pytest.mark.parametrize(
    ("loss_classes", "probability"),
    [
        ("task", 3 / (3 + 2)),  # classes 1 and 2
        ("seen", 3 / (1 + 3 + 2)),  # 0, 1 and 2
        ("all", 3 / (1 + 3 + 2 + 4)),
    ],
)
def test_cross_entropy_by_hand(loss_classes, probability):
    method = SGDParameters(loss_classes=loss_classes).build(toys.network())
    loss = method.cross_entropy(LOGITS, torch.tensor([1]), SECOND)
    assert loss.item() == pytest.approx(-math.log(probability), rel=1e-5)


@pytest.mark.parametrize(("loss_classes", "rows"), [("task", {1, 2}), ("seen", {0, 1, 2}), ("all", {0, 1, 2, 3})])
def test_rows_of_the_head_outside_the_loss_get_no_gradient(loss_classes, rows):
    method = SGDParameters(loss_classes=loss_classes).build(toys.network())
    method.loss(SECOND.task.train.load(slice(0, 6)), SECOND).backward()
    assert set(method.network.fc.weight.grad.abs().sum(1).nonzero().flatten().tolist()) == rows


def test_sgd_trains_everything_and_keeps_nothing():
    parameters = SGDParameters()
    assert parameters.default_freeze == "none"
    method = parameters.build(toys.network())
    method.begin_task(SECOND)
    method.end_task(SECOND)
    assert method.state_dict() == {}


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_asks_one_place_for_the_prefixs_outputs(tmp_path, name, monkeypatch):
    """With that place counted and the network's own way closed, two tasks are learned and tested."""
    device = toys.device(tmp_path, method={"name": name}, network={"freeze": "layer3"}, training={"epochs": 1})
    asked = []

    class Counted(PrefixFeatures):
        def __call__(self, batches, on_map=None):
            asked.append(len(batches))
            return type(self.network).features(self.network, torch.cat([b.images for b in batches]), on_map)

    def closed(*_):
        raise AssertionError("the prefix was called past features_of")

    device.method.prefix_features = Counted(device.network)
    monkeypatch.setattr(device.network, "features", closed)
    for task in range(device.stream.first, 2):
        device.train(task, 1)
        device.evaluate()
    assert asked


def test_test_images_and_samples_name_their_origin():
    batch = SECOND.sample(3, "memory")
    assert batch.origin is not None
    again = batch.origin.load()
    assert torch.equal(again.images, batch.images)
    assert torch.equal(again.labels, batch.labels)
