"""SparCL: masks over weights and gradients, and data removal."""

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F

from lightcl.data.tasks import Batch
from lightcl.methods.parts.dynamic_masks import DynamicMasks, strongest
from lightcl.methods.sparcl import SparCLDERppParameters, SparCLERParameters, Sparse
from tests.lightcl import toys

FIRST, SECOND = toys.context(0, [0, 1]), toys.context(1, [2, 3], seen=[0, 1, 2, 3])
BOTH = [SparCLERParameters, SparCLDERppParameters]
LAYERS = {f"layer4.{block}.conv{i}.weight" for block in (0, 1) for i in (1, 2)}


def make(parameters=SparCLERParameters, freeze: str = "layer3", **keys) -> Sparse:
    method = parameters(**{"sparsity": 0.75, "interval": 1} | keys).build(toys.network(freeze=freeze))
    assert isinstance(method, Sparse)
    return method


def begin(method: Sparse, context=FIRST) -> None:
    method.network.train()
    method.begin_task(context)


def step(method: Sparse, context, *, momentum: float = 0.0, optimizer=None) -> None:
    batch = context.task.train.load(slice(0, 8))
    optimizer = optimizer or torch.optim.SGD(list(method.trainable().values()), lr=0.1, momentum=momentum)
    loss = method.loss(batch, context)
    optimizer.zero_grad()
    loss.backward()
    method.before_step(batch, context)
    optimizer.step()
    method.after_step(batch, context)


def share(masks: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: mask.float().mean().item() for name, mask in masks.items()}


# -- masks ---------------------------------------------------------------------------------------------------------


def test_strongest_by_hand():
    scores, among = torch.tensor([[3.0, 9.0], [5.0, 4.0]]), torch.tensor([[True, False], [True, True]])
    assert strongest(scores, among, 2).tolist() == [[False, False], [True, True]]
    assert strongest(scores, among, 9).tolist() == among.tolist()
    assert strongest(torch.ones(3), torch.ones(3, dtype=torch.bool), 2).tolist() == [True, True, False]


def test_first_mask_is_by_magnitude():
    method = make()
    before = toys.copy_of(method.masks.weights)
    begin(method)
    assert set(method.masks.present) == LAYERS
    for name, weight in method.masks.weights.items():
        kept, dropped = before[name][method.masks.present[name]].abs(), before[name][~method.masks.present[name]].abs()
        assert kept.min() >= dropped.max()
        assert torch.equal(weight.detach(), before[name] * method.masks.present[name])
    assert share(method.masks.present) == {name: pytest.approx(0.25) for name in LAYERS}


def test_adjustment_by_hand():
    """Of 9·4·4 = 144 weights 36 are present; a tenth of all is exchanged: the 14 least important ones."""
    network = toys.network(freeze="none")
    masks = DynamicMasks(network, sparsity=0.75, updated=0.2)
    masks.start()
    name = "layer1.0.conv1.weight"
    importance = {n: torch.arange(w.numel(), dtype=torch.float32).view_as(w) for n, w in masks.weights.items()}
    before = masks.present[name].flatten().nonzero().flatten().tolist()
    masks.shrink(importance, below=0.1)
    left = masks.present[name].flatten().nonzero().flatten().tolist()
    assert (len(before), left) == (36, before[-22:])  # round(0.15 * 144) = 22
    masks.grow(seed=3)
    grown = set(masks.present[name].flatten().nonzero().flatten().tolist())
    assert len(grown) == 36
    assert set(left) < grown
    assert network.layer1[0].conv1.weight.flatten()[sorted(grown - set(left))].abs().max() == 0
    masks.choose_updated(importance)
    updated = masks.updated[name].flatten().nonzero().flatten().tolist()
    assert updated == sorted(grown)[-29:]  # round(0.2 * 144) = 29


def test_growth_is_drawn_by_seed():
    grown = []
    for seed in (1, 1, 2):
        masks = DynamicMasks(toys.network(), sparsity=0.75, updated=0.2)
        masks.start()
        masks.grow(seed, extra=0.1)
        assert share(masks.present) == {name: pytest.approx(0.35, abs=1e-3) for name in LAYERS}
        grown.append(masks.present)
    toys.assert_same(grown[0], grown[1])
    assert toys.changed(grown[2], grown[0]) == LAYERS


@pytest.mark.parametrize("parameters", BOTH)
def test_masked_weights_stay_exactly_zero(tmp_path, parameters):
    """Through an entire stream, with momentum and weight decay, which ignore masks."""
    name = parameters.model_fields["name"].default
    device = toys.device(
        tmp_path,
        method={"name": name, "sparsity": 0.9, "interval": 1, "intra_task": 0.05, "inter_task": 0.05},
        network={"freeze": "layer2"},
        training={"epochs": 3, "momentum": 0.9, "weight_decay": 0.01},
    )
    seen = []
    for task in (0, 1):
        for epochs in (1, 2, 3):
            device.train(task, epochs)
            masks = device.method.masks
            for layer, weight in masks.weights.items():
                assert weight[~masks.present[layer]].abs().max() == 0
            seen.append(toys.copy_of(masks.present))
    assert share(seen[-1]) == {layer: pytest.approx(0.1, abs=1e-3) for layer in seen[-1]}
    assert share(seen[3]) == {layer: pytest.approx(0.1, abs=1e-3) for layer in seen[3]}  # adjusted after an epoch
    assert toys.changed(seen[1], seen[0]) == set(seen[0])


def test_a_new_task_gets_more_weights_until_the_next_adjustment():
    method = make(inter_task=0.1)
    begin(method)
    method.network.eval()
    method.end_task(FIRST)
    begin(method, SECOND)
    assert share(method.masks.present) == {name: pytest.approx(0.35, abs=1e-3) for name in LAYERS}
    method.network.eval()
    method.end_task(SECOND)  # a task without an adjustment
    assert share(method.masks.present) == {name: pytest.approx(0.25, abs=1e-3) for name in LAYERS}


def test_masked_gradients_do_not_change_weights():
    method = make(gradient_sparsity=0.9)
    begin(method)
    assert share(method.masks.updated) == {name: pytest.approx(0.1, abs=1e-3) for name in LAYERS}
    before = toys.copy_of(method.masks.weights)
    step(method, FIRST)
    for name, weight in method.masks.weights.items():
        updated = method.masks.updated[name]
        assert not (updated & ~method.masks.present[name]).any()
        assert torch.equal(weight.detach()[~updated], before[name][~updated])
        assert not torch.equal(weight.detach()[updated], before[name][updated])


def test_default_gradient_mask_holds_a_fifth_back():
    assert SparCLERParameters().updated == pytest.approx(0.08)
    assert SparCLERParameters(gradient_sparsity=0.95).updated == pytest.approx(0.05)
    with pytest.raises(ValidationError, match=r"gradient_sparsity is 0.5, but .* at least method.sparsity \(0.9\)"):
        SparCLERParameters(gradient_sparsity=0.5)


def test_importance_of_weights_by_the_formula():
    """|w| + α·|∂L̃(new)/∂w| + β·|∂L(buffer)/∂w|, L̃ over the classes of the task alone."""
    method = make(importance_new=2.0, importance_old=3.0)
    begin(method)
    step(method, FIRST)
    begin(method, SECOND)
    gradients = method.gradients(SECOND)
    assert method.network.training
    network = method.network.eval()
    weight = network.layer4[1].conv2.weight
    new = SECOND.task.train.load()
    new_loss = F.cross_entropy(network(new.images)[:, [2, 3]], new.labels - 2)
    old = method.buffer.rows
    old_loss = F.cross_entropy(network(old["images"]), old["labels"])
    new_part, old_part = (torch.autograd.grad(loss, weight)[0].abs() for loss in (new_loss, old_loss))
    name = "layer4.1.conv2.weight"
    assert torch.allclose(gradients[name], 2 * new_part + 3 * old_part, rtol=1e-3, atol=1e-6)
    expected = weight.detach().abs() + gradients[name]
    assert torch.equal(method.importance(gradients)[name], expected)


# -- data ----------------------------------------------------------------------------------------------------------


def test_the_samples_that_were_wrong_most_often_stay():
    method = make()
    begin(method)
    total = len(FIRST.task.train)
    method.wrong[[3, 5, 8]] = torch.tensor([1, 4, 2])
    method.remove_data(total - 2, seed=1)
    assert method.kept.tolist() == [5, 8]
    chosen = method.select(FIRST.task.train, FIRST, 1)
    assert chosen.indices.tolist() == FIRST.task.train.indices[[5, 8]].tolist()


def test_ties_are_drawn_by_seed():
    left = []
    for seed in (1, 1, 2):
        method = make()
        begin(method)
        method.remove_data(10, seed)
        left.append(method.kept.tolist())
    assert left[0] == left[1] != left[2]
    assert len(left[0]) == len(FIRST.task.train) - 10


def test_misclassified_samples_are_counted_where_they_belong():
    """Positions in a batch are those among the remaining samples."""
    method = make()
    begin(method)
    method.kept = torch.tensor([4, 6, 7, 9])
    method.logits = None
    with torch.no_grad():
        method.network.fc.weight.zero_()
        method.network.fc.bias.copy_(torch.tensor([0.0, 1.0, 0.0, 0.0]))  # always says 1
    samples = method.select(FIRST.task.train, FIRST, 1)
    labels = torch.tensor([0, 1, 0])
    for _ in range(2):
        method.loss(Batch(samples.load(slice(0, 3)).images, labels, torch.tensor([3, 1, 0])), FIRST)
    assert method.wrong.nonzero().flatten().tolist() == [4, 9]
    assert method.wrong[[4, 9]].tolist() == [2, 2]


def test_data_is_removed_in_equal_parts_in_the_first_part_of_a_task(tmp_path):
    """10 epochs, an adjustment after every second, until epoch 0.6·10: after 2, 4 and 6 a third of 30 % each."""
    device = toys.device(
        tmp_path,
        method={"name": "sparcl-er", "interval": 2, "removal_until": 0.6, "removed_data": 0.3},
        training={"epochs": 10},
        network={"freeze": "layer3"},
    )
    total, left = 36, []
    for epochs in range(1, 10):
        device.train(0, epochs)
        left.append(len(device.method.kept))
    assert left == [total, total - 4, total - 4, total - 7, total - 7, total - 11, total - 11, total - 11, total - 11]
    device.train(0, 10)
    device.train(1, 1)
    assert len(device.method.kept) == total  # a new task has all its samples


def test_the_reservoir_gets_the_right_images_when_data_is_left_out(tmp_path):
    device = toys.device(
        tmp_path, method={"name": "sparcl-er", "interval": 1, "removed_data": 0.5}, training={"epochs": 5}
    )
    device.train(0, 5)
    rows, train = device.method.buffer.rows, device.stream[0].train.load()
    known = {image.numpy().tobytes(): int(label) for image, label in zip(train.images, train.labels, strict=True)}
    for image, label in zip(rows["images"], rows["labels"], strict=True):
        assert known[image.numpy().tobytes()] == label


def test_masks_of_different_devices_are_never_averaged():
    with pytest.raises(ValidationError, match=r"method sparcl-er .* cannot be averaged"):
        toys.scenario(method={"name": "sparcl-er"}, server={"aggregation": "suffix"})


@pytest.mark.parametrize("parameters", BOTH)
def test_everything_but_the_head_may_be_frozen(parameters):
    method = make(parameters, freeze="layer4")
    begin(method)
    step(method, FIRST)
    method.end_epoch(FIRST, 0)
    assert method.masks.present == {}


def test_cost():
    sparse, denser = SparCLERParameters().cost(), SparCLDERppParameters(sparsity=0.5).cost()
    assert (sparse.replayed, sparse.weight_sparsity, sparse.stored_logits) == (15, 0.9, 0)
    assert (denser.replayed, denser.weight_sparsity, denser.stored_logits) == (30, 0.5, 15)
