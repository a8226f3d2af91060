"""FLOPs against PyTorch's own counter; memory against hand-worked sums and against what is allocated."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from lightcl.analysis.footprint.shapes import shape_of
from lightcl.analysis.footprint.theory import (
    CATEGORIES,
    Workload,
    _Step,
    footprint,
    step_flops,
    training_flops,
    workload_of,
)
from lightcl.device.prefix import prefix_cache
from lightcl.methods.base import StepCost
from lightcl.networks.pruning import prune_
from tests.lightcl import toys

IMAGE = (3, 16, 16)
WORK = Workload(IMAGE, batch=6, epochs=3, images=(13, 12))
PLAIN = StepCost()


def counted(run) -> int:
    counter = FlopCounterMode(display=False)
    with counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
@pytest.mark.parametrize("freeze", ["none", "layer2.0", "layer3", "layer4"])
def test_flops_of_a_step_are_those_of_pytorchs_counter(freeze, stem):
    network = toys.network(freeze=freeze, stem=stem).train()
    images = toys.images(6, size=16)

    def step() -> None:
        network(images).sum().backward()

    assert step_flops(shape_of(network, IMAGE), PLAIN, WORK) == counted(step)


def test_flops_of_the_prefix_are_those_of_pytorchs_counter():
    network = toys.network(freeze="layer3")
    shape = shape_of(network, IMAGE)
    assert 2 * sum(b.macs for b in shape.frozen) == counted(lambda: network.features(toys.images(1, size=16)))


def test_flops_of_a_pruned_network_fall():
    network, whole = toys.network(), toys.network()
    prune_(network, {"layer3": 0.5, "layer4": 0.5})
    images = toys.images(6, size=16)
    given = step_flops(shape_of(network, IMAGE), PLAIN, WORK)
    assert given == counted(lambda: network.train()(images).sum().backward())
    assert given < step_flops(shape_of(whole, IMAGE), PLAIN, WORK)


def test_flops_of_lightcls_step_are_those_of_pytorchs_counter():
    """32 new samples pass through everything, the memory samples through suffix and head."""
    scenario = toys.scenario(method={"name": "lightcl", "memory_size": 5})
    network = toys.network(freeze="layer3")
    method = scenario.method.build(network)
    method.end_task(toys.context(0, [0, 1]))
    context = toys.context(1, [2, 3], seen=[0, 1, 2, 3])
    network.train()
    method.begin_task(context)
    batch = context.task.train.load(slice(0, 6))
    work = replace(WORK, image=(3, 8, 8))
    expected = counted(lambda: method.loss(batch, context).backward())
    assert step_flops(shape_of(network, work.image), scenario.method.cost(), work) == expected


def test_flops_of_training_by_hand():
    """Tasks of 13 and 12 images in batches of 6: 3 and 2 steps; three epochs."""
    shape = shape_of(toys.network(freeze="layer3"), IMAGE)
    image = step_flops(shape, PLAIN, replace(WORK, batch=1))
    assert training_flops(shape, PLAIN, WORK) == 3 * 25 * image
    assert training_flops(shape, StepCost(replayed=4), WORK) == 3 * (25 + 4 * 5) * image
    held = step_flops(shape, StepCost(suffix_samples=1), replace(WORK, batch=1)) - image
    assert training_flops(shape, StepCost(suffix_samples=4), WORK) == 3 * (25 * image + 4 * 2 * held)


# -- memory --------------------------------------------------------------------------------------------------------


def test_the_stored_state_by_hand():
    """Head only: 4 classes of 32 pooled features; 5 patterns of 32x2x2 features and 4 logits."""
    network = toys.network(freeze="layer4")
    cost = StepCost(
        suffix_samples=5, pattern_samples=5, weight_copies=2, stored_images=7, stored_logits=7, vital_ratio=0.5
    )
    memory = footprint(network, cost, replace(WORK, momentum=True)).memory
    head = 4 * (32 + 1) * 4
    assert memory["optimizer state"] == head
    assert memory["weight copies"] == 2 * head
    assert memory["buffer"] == (6 + 7) * 3 * 16 * 16 + 7 * 4 * 4
    assert memory["patterns"] == 5 * (32 * 2 * 2 + 4) * 4
    numbers = sum(p.numel() for p in network.parameters())
    statistics = sum(b.numel() for n, b in network.named_buffers() if "running" in n)
    assert memory["parameters"] == 4 * (numbers + statistics)


@pytest.mark.parametrize(("optimizer", "copies"), [("sgd", 0), ("adam", 2), ("adamw", 2)])
def test_adam_keeps_two_moments(optimizer, copies):
    """Head only: 4 classes of 32 pooled features."""
    memory = footprint(toys.network(freeze="layer4"), PLAIN, replace(WORK, optimizer=optimizer)).memory
    assert memory["optimizer state"] == copies * 4 * (32 + 1) * 4


def test_patterns_hold_vital_channels_and_no_more_than_all():
    network = toys.network(freeze="layer3")
    maps = 4 * 32 * 2 * 2
    features = 16 * 4 * 4
    for ratio, share in ((0.25, 0.25), (1.0, 1.0)):
        memory = footprint(network, StepCost(pattern_samples=5, vital_ratio=ratio), WORK).memory
        assert memory["patterns"] == 5 * (features + share * maps + 4) * 4
        assert memory["masks"] == 4 * 32
    three = footprint(network, StepCost(pattern_samples=5, vital_ratio=0.25), replace(WORK, images=(9, 9, 9)))
    assert three.memory["patterns"] == 5 * (features + 0.5 * maps + 4) * 4


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
@pytest.mark.parametrize("freeze", ["none", "layer1", "layer4.0"])
def test_kept_activations_are_what_autograd_saves(freeze, stem):
    """Its saved tensors by storage, without the weights, after a forward pass and the loss."""
    network = toys.network(freeze=freeze, stem=stem, width=8).train()
    weights = {p.untyped_storage().data_ptr() for p in (*network.parameters(), *network.buffers())}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.numel() > 64:  # smaller ones are statistics of a batch
            saved[storage.data_ptr()] = storage
        return tensor

    images = toys.images(6, size=64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = F.cross_entropy(network(images), torch.zeros(6, dtype=torch.int64))
    given = sum(storage.nbytes() for storage in saved.values())
    assert loss.requires_grad
    shape = shape_of(network, (3, 64, 64))
    step = _Step(shape, PLAIN, Workload((3, 64, 64), 6, 1, (6,)))
    step._forward(6)
    features = 6 * shape.features * 4 if shape.frozen else 0
    assert given == pytest.approx(step.live["kept activations"] + features, rel=0.01)


def test_a_larger_freeze_point_and_a_smaller_batch_need_less():
    peaks = [footprint(toys.network(freeze=f), PLAIN, WORK).peak for f in ("none", "layer1", "layer2", "layer3")]
    assert peaks == sorted(peaks, reverse=True)
    assert len(set(peaks)) == 4
    network = toys.network()
    assert footprint(network, PLAIN, replace(WORK, batch=3)).peak < footprint(network, PLAIN, WORK).peak
    assert set(footprint(network, PLAIN, WORK).memory) == set(CATEGORIES)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("held", [0, 5])
def test_updated_at_once_one_gradient_exists_at_a_time(precision, held):
    """With memory samples, the gradients of their pass wait for the batch's pass."""
    shape = shape_of(toys.network(freeze="layer3"), IMAGE)
    work = replace(WORK, precision=precision, at_once=True)
    cost = StepCost(suffix_samples=held)
    gradients: list[int] = []

    class Watched(_Step):
        def note(self, moment, category="temporaries", amount=0):
            gradients.append(self.live["gradients"])
            super().note(moment, category, amount)

    Watched(shape, cost, work).play()
    block = shape.trained[0]  # layer4.0: its second convolution is as large as those of layer4.1
    biggest = 4 * (block.second.weights + block.second.norm)
    if held:
        assert max(gradients) >= 0.5 * 4 * shape.trained_parameters
    else:
        assert max(gradients) == biggest
    after, at_once = _Step(shape, cost, replace(work, at_once=False)), _Step(shape, cost, work)
    after.play()
    at_once.play()
    assert sum(at_once.worst.values()) <= sum(after.worst.values())
    assert at_once.live == after.live


# -- disk --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"method": {"name": "lightcl"}},
        {"method": {"name": "sgd"}},
        {"method": {"name": "er"}},
        {"method": {"name": "ewc"}},
    ],
    ids=lambda changes: changes["method"]["name"],
)
def test_the_disk_that_is_counted_is_what_a_device_takes(tmp_path, changes, monkeypatch):
    monkeypatch.setenv("LIGHTCL_CACHE", str(tmp_path / "cache"))
    sections = {"network": {"weights": "none", "width": 16}, "data": {"views": 2}} | changes
    device = toys.device(tmp_path / "state", **sections)
    for task in device.stream.ids:
        device.train(task, 2)  # an epoch for each view
        device.evaluate()
    cost = device.scenario.method.cost_on(device.network)
    disk = footprint(device.network, cost, workload_of(device.scenario, device.stream, IMAGE)).disk
    state = sum(file.stat().st_size for file in tmp_path.glob("state/**/*.safetensors"))
    assert 0.9 < state / disk["state"] < 1.1
    stores = prefix_cache().stores()
    rows = sum(store.rows for store in stores)
    if device.scenario.caches_prefix:
        most = workload_of(device.scenario, device.stream, IMAGE).cached_outputs
        looked_at = sum(len(task.train) for task in device.stream)  # without augmentation; this method looks at a batch
        assert most - looked_at < rows <= most
        assert disk["prefix cache"] == most * shape_of(device.network, IMAGE).features * 4
    else:
        assert rows == disk["prefix cache"] == 0
