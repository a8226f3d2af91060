"""The training loop and the evaluation loop."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from lightcl.data.sources import ImageSet
from lightcl.data.tasks import Samples, Task
from lightcl.device import training
from lightcl.device.optimizers import make_optimizer, updates_at_once
from lightcl.device.training import TaskAccuracy, TrainingFailure, evaluate, train_epoch
from lightcl.methods import Method
from lightcl.methods.sgd import SGDParameters
from lightcl.networks.resnet import StagedResNet
from tests.lightcl import toys


def run(network: StagedResNet, epochs: int = 2, tasks: int = 2, **sections):
    """Both tasks as a device learns them; returns the losses."""
    scenario = toys.scenario(**sections)
    method = scenario.method.build(network)
    losses = []
    for context in (toys.context(0, [0, 1]), toys.context(1, [2, 3], seen=[0, 1, 2, 3]))[:tasks]:
        context = replace(context, augmentation=scenario.augmentation)
        optimizer = make_optimizer(method, scenario)
        network.train()
        method.begin_task(context)
        losses += [train_epoch(method, optimizer, context, scenario, epoch) for epoch in range(epochs)]
        network.eval()
        method.end_task(context)
    return losses


@pytest.mark.parametrize("freeze", ["stem", "layer2.0", "layer3", "layer4"])
def test_frozen_prefix_is_bit_identical_after_training(freeze):
    """Parameters, running statistics and counters."""
    network = toys.network(freeze=freeze)
    before = toys.copy_of(network.state_dict())
    run(network)
    trained = {name for name in before if name in network.suffix.state_dict() or name.startswith("fc.")}
    assert toys.changed(network.state_dict(), before) == trained


def test_frozen_batch_norm_in_training_mode_moves_its_statistics_and_nothing_else():
    network = toys.network(freeze="layer3", frozen_batch_norm="train")
    before = toys.copy_of(network.prefix.state_dict())
    run(network)
    buffers = {name for name, _ in network.named_buffers() if name in before}
    assert toys.changed(network.prefix.state_dict(), before) == buffers
    assert {name.rpartition(".")[2] for name in buffers} == {"running_mean", "running_var", "num_batches_tracked"}


def test_evaluation_changes_no_tensor():
    network = toys.network(freeze="layer3", frozen_batch_norm="train").train()
    before = toys.copy_of(network.state_dict())
    evaluate(plain(network), [toys.task(0, [0, 1])], toys.scenario(), toys.CPU)
    toys.assert_same(network.state_dict(), before)


def test_training_with_nothing_frozen_moves_everything():
    network = toys.network(freeze="none")
    before = toys.copy_of(network.state_dict())
    run(network, method={"name": "sgd"})
    assert toys.changed(network.state_dict(), before) == set(before)


def test_training_repeats_bit_by_bit_whatever_the_global_generators_did():
    first, second = toys.network(), toys.network()
    losses = run(first)
    torch.rand(3)
    np.random.default_rng().random()
    assert run(second) == losses
    toys.assert_same(second.state_dict(), first.state_dict())


def test_every_epoch_has_different_batches():
    scenario, context, networks = toys.scenario(), toys.context(0, [0, 1]), []
    for epoch in (0, 0, 1):
        network = toys.network()
        method = scenario.method.build(network)
        train_epoch(method, make_optimizer(method, scenario), context, scenario, epoch)
        networks.append(network.state_dict())
    toys.assert_same(networks[0], networks[1])
    assert "fc.weight" in toys.changed(networks[2], networks[0])


def test_training_learns():
    network = toys.network(freeze="none")
    losses = run(network, epochs=8, tasks=1, training={"learning_rate": 0.05}, data={"augmentation": "none"})
    assert losses[-1] < 0.3 * losses[0]
    (accuracy,) = evaluate(plain(network), [toys.task(0, [0, 1])], toys.scenario(), toys.CPU)
    assert accuracy.til > 0.8


def test_regularization_keeps_the_patterns_in_place():
    """With β = 0 nothing keeps the suffix from following the new task. Four networks, since how far one of them moves
    depends on the rounding of the processor."""
    free, kept = (sum(pattern_movement(beta, seed) for seed in range(4)) for beta in (0.0, 0.003))
    assert kept < 0.6 * free


def pattern_movement(beta: float, seed: int) -> float:
    """Squared distance of the vital feature maps before and after a second task."""
    network = toys.network(seed=seed)
    run(network, epochs=3, tasks=1)
    before = toys.copy_of(network.state_dict())
    scenario = toys.scenario(method={"beta": beta}, training={"learning_rate": 0.01})
    method = scenario.method.build(network)
    method.end_task(toys.context(0, [0, 1]))
    context = toys.context(1, [2, 3], seen=[0, 1, 2, 3])
    network.train()
    method.begin_task(context)
    optimizer = make_optimizer(method, scenario)
    for epoch in range(3):
        train_epoch(method, optimizer, context, scenario, epoch)
    samples = context.sample(5, "memory").images
    now, then = {}, {}
    network.eval()
    with torch.no_grad():
        network.classify(network.features(samples), now.__setitem__)
        network.load_state_dict(before)
        network.classify(network.features(samples), then.__setitem__)
    return sum(float((now[m] - then[m])[:, mask].square().sum()) for m, mask in method.vital.items())


@pytest.mark.parametrize(("name", "kind"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)])
def test_adam_by_name(name, kind):
    training = {"optimizer": name, "learning_rate": 0.001, "weight_decay": 0.1}
    scenario = toys.scenario(training=training)
    optimizer = make_optimizer(scenario.method.build(toys.network()), scenario)
    assert type(optimizer) is kind
    assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (0.001, 0.1)


def test_momentum_is_for_sgd_only():
    with pytest.raises(ValueError, match=r"training\.momentum is 0\.9, but training\.optimizer adam has no such"):
        toys.scenario(training={"optimizer": "adam", "momentum": 0.9})


def test_optimizer_takes_the_scenarios_values_and_only_what_is_trained():
    network = toys.network(freeze="layer4.0")
    scenario = toys.scenario(training={"learning_rate": 0.3, "momentum": 0.8, "weight_decay": 0.02})
    (group,) = make_optimizer(scenario.method.build(network), scenario).param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.3, 0.8, 0.02)
    trained = [*network.suffix.parameters(), *network.head.parameters()]
    assert {id(p) for p in group["params"]} == {id(p) for p in trained}


def test_a_nan_loss_stops_training_with_advice():
    with pytest.raises(TrainingFailure, match=r"loss became (nan|inf) in task 0, epoch 1; .*learning_rate \(1e\+30\)"):
        run(toys.network(), training={"learning_rate": 1e30})


def test_bf16_trains_with_fp32_weights():
    network = toys.network()
    losses = run(network, device={"precision": "bf16", "accelerator": "cpu"})
    assert np.isfinite(losses).all()
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}


# -- evaluation ----------------------------------------------------------------------------------------------------


def plain(network: StagedResNet) -> Method:
    return Method(network, SGDParameters())


def constant(*logits: float) -> StagedResNet:
    """A network whose head gives the same logits for every image."""
    network = toys.network(classes=len(logits))
    with torch.no_grad():
        network.fc.weight.zero_()
        network.fc.bias.copy_(torch.tensor(logits))
    return network


def task_of(number: int, classes: tuple[int, ...], labels: list[int], held_out: list[int] = ()) -> Task:
    """A task with test (and held-out) images of these labels."""

    def samples(wanted: list[int]) -> Samples:
        return Samples(toys.image_set(wanted, 4) if wanted else EMPTY, np.arange(len(wanted)))

    return Task(number, classes, samples([]), samples(held_out), samples(labels))


EMPTY = ImageSet(np.empty((0, 8, 8, 3), dtype=np.uint8), np.empty(0, dtype=np.int64), ())


def test_til_and_cil_by_hand():
    # The logits order the classes 0 > 2 > 1 > 3 for every image. CIL always says 0.
    # Task 0 (classes 0 and 2): TIL says 0 as well; three of four images are of class 0.
    # Task 1 (classes 1 and 3): TIL says 1, which two of five images are; CIL is never right.
    tasks = [task_of(0, (0, 2), [0, 2, 0, 0]), task_of(1, (1, 3), [1, 3, 3, 1, 3])]
    assert evaluate(plain(constant(3.0, 1.0, 2.0, 0.0)), tasks, toys.scenario(), toys.CPU) == [
        TaskAccuracy(til=0.75, cil=0.75, images=4),
        TaskAccuracy(til=0.4, cil=0.0, images=5),
    ]


@pytest.mark.parametrize("batch", [1, 2, 3, 100])
def test_accuracy_does_not_depend_on_the_batches(monkeypatch, batch):
    monkeypatch.setattr(training, "EVALUATION_BATCH", batch)
    task = task_of(0, (0, 1), [1, 0, 1, 1, 0, 1, 1])
    (accuracy,) = evaluate(plain(constant(0.0, 1.0)), [task], toys.scenario(), toys.CPU)
    assert accuracy == TaskAccuracy(5 / 7, 5 / 7, 7)


def test_held_out_samples_are_tested_when_asked_for():
    task = task_of(0, (0, 1), [0, 0, 0], held_out=[1, 0, 1, 1])
    network = constant(0.0, 1.0)
    scenario = toys.scenario(stream={"evaluate_on": "held-out"})
    assert evaluate(plain(network), [task], scenario, toys.CPU) == [TaskAccuracy(0.75, 0.75, 4)]
    assert evaluate(plain(network), [task], toys.scenario(), toys.CPU) == [TaskAccuracy(0.0, 0.0, 3)]


# -- update: at-once -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lightcl", "sgd", "er", "derpp", "pnn"])
@pytest.mark.parametrize("decay", [0.0, 0.01])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_updating_at_once_gives_the_same_numbers(method, decay, precision):
    """Two passes (the batch's and the memory samples') go through the same weights in one step."""
    ends = []
    for update in ("after", "at-once"):
        scenario = {
            "method": {"name": method}, "training": {"batch_size": 8, "weight_decay": decay, "update": update},
            "device": {"precision": precision, "accelerator": "cpu"},
        }  # fmt: skip
        freeze = "none" if method in ("sgd", "er", "derpp", "pnn") else "layer3"
        network = toys.network(freeze=freeze)
        losses = run(network, **scenario)
        ends.append((losses, toys.copy_of(network.state_dict())))
    assert ends[0][0] == ends[1][0]
    toys.assert_same(ends[0][1], ends[1][1])


def test_at_once_two_gradients_never_exist_together():
    """While a weight is updated, no other weight has a gradient; after the update, this one has none either."""
    network = toys.network(freeze="layer3").train()
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.1)
    most = []
    with updates_at_once(optimizer):
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.register_post_accumulate_grad_hook(
                lambda _: most.append(sum(p.grad is not None for p in network.parameters()))
            )
        network(toys.images(4)).sum().backward()
    assert len(most) == len(optimizer.param_groups[0]["params"])
    assert max(most) == 0
    before = toys.copy_of(dict(network.named_parameters()))
    network(toys.images(4)).sum().backward()  # outside the `with` nothing moves
    toys.assert_same(dict(network.named_parameters()), before)


@pytest.mark.parametrize(
    ("sections", "text"),
    [
        ({"training": {"update": "at-once", "momentum": 0.9}}, "momentum 0.9 is not plain SGD"),
        ({"training": {"update": "at-once", "optimizer": "adam"}}, "optimizer adam is not plain SGD"),
        ({"training": {"update": "at-once"}, "method": {"name": "ewc"}}, "method ewc changes the gradients"),
        (
            {"training": {"update": "at-once"}, "method": {"name": "sparcl-er"}},
            "method sparcl-er changes the gradients",
        ),
    ],
)
def test_at_once_is_refused_where_it_would_change_numbers(sections, text):
    with pytest.raises(ValidationError, match=text):
        toys.scenario(**sections)
