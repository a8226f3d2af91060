"""PNN: columns, their lateral connections, and nothing forgotten."""

import pytest
import torch
from pydantic import ValidationError

from lightcl.data.tasks import Batch
from lightcl.methods.base import StepCost
from lightcl.methods.pnn import PNN, PNNParameters
from tests.lightcl import toys

FIRST, SECOND = toys.context(0, [0, 1]), toys.context(1, [2, 3], seen=[0, 1, 2, 3])
THIRD = toys.context(2, [0, 2], seen=[0, 1, 2, 3])
IMAGES = toys.images(3)
BATCH = Batch(IMAGES, torch.zeros(3, dtype=torch.int64))


def make(freeze: str = "layer3") -> PNN:
    method = PNNParameters().build(toys.network(freeze=freeze))
    assert isinstance(method, PNN)
    return method


def learn(method: PNN, context, steps: int = 3) -> None:
    """A few steps, as the training loop takes them."""
    method.network.train()
    method.begin_task(context)
    optimizer = torch.optim.SGD(list(method.trainable().values()), lr=0.1)
    for _ in range(steps):
        loss = method.loss(context.task.train.load(slice(0, 8)), context)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    method.network.eval()
    method.end_task(context)


def stir_(method: PNN, column: int) -> None:
    """Gives the adapters of a column weights that are not zero."""
    generator = torch.Generator().manual_seed(column)
    with torch.no_grad():
        for weight in method.adapters[column].parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator))
        for norm in (adapter.norm for adapter in method.adapters[column].values()):
            norm.running_mean.copy_(torch.randn(norm.running_mean.shape, generator=generator))
            norm.running_var.copy_(1 + torch.rand(norm.running_var.shape, generator=generator))


def test_first_column_is_the_network():
    method = make()
    method.network.eval()
    method.begin_task(FIRST)
    assert torch.equal(method.predict(BATCH), method.network(IMAGES).detach())
    assert method.trainable().keys() == {n for n, p in method.network.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("freeze", ["layer3", "none"])
def test_a_new_column_starts_as_the_initial_network(freeze):
    method = make(freeze)
    learn(method, FIRST)
    method.begin_task(SECOND)
    method.network.eval()
    initial = toys.network(freeze=freeze).eval()
    toys.assert_same(method.network.state_dict(), initial.state_dict())
    assert torch.equal(method.all_logits(BATCH)[1], initial(IMAGES))


@pytest.mark.parametrize("freeze", ["layer3", "layer2.0", "none"])
def test_predictions_for_old_tasks_never_change(freeze):
    method = make(freeze)
    learn(method, FIRST)
    after_first = method.predict(BATCH)[:, [0, 1]]
    learn(method, SECOND)
    both = method.predict(BATCH)
    assert torch.equal(both[:, [0, 1]], after_first)
    assert not torch.equal(both[:, [2, 3]], toys.network(freeze=freeze).eval()(IMAGES)[:, [2, 3]])
    learn(method, toys.context(2, [3], seen=[0, 1, 2, 3]))
    assert torch.equal(method.predict(BATCH)[:, [0, 1, 2]], both[:, [0, 1, 2]])


def test_lateral_connection_by_the_formula():
    """h_2 + U·relu(norm(V·[h_0, h_1])) before the head, position by position, from the columns' own suffixes."""
    method = make()
    for context in (FIRST, SECOND):
        learn(method, context)
    method.begin_task(THIRD)
    stir_(method, 1)
    stir_(method, 2)
    method.network.eval()
    columns = [*method.frozen, method.network]
    with torch.no_grad():
        h = [column.suffix(column.features(IMAGES)) for column in columns]

        def lateral(k: int) -> torch.Tensor:
            adapter = method.adapters[k]["layer4"]
            v, u = adapter.v.weight[:, :, 0, 0], adapter.u.weight[:, :, 0, 0]
            inner = torch.einsum("oc,nchw->nohw", v, torch.cat(h[:k], 1))
            mean, deviation = adapter.norm.running_mean, (adapter.norm.running_var + 1e-5).sqrt()
            weight, bias = adapter.norm.weight, adapter.norm.bias
            inner = torch.einsum("nchw,c->nchw", inner - mean[:, None, None], weight / deviation) + bias[:, None, None]
            return torch.einsum("oc,nchw->nohw", u, inner.clamp(min=0)) + adapter.u.bias[:, None, None]

        expected = [columns[k].fc((h[k] + (lateral(k) if k else 0)).mean((2, 3))) for k in range(3)]
        given = method.all_logits(BATCH)
    for one, other in zip(given, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-4)
    assert (expected[2] - columns[2].fc(h[2].mean((2, 3)))).abs().max() > 0.1  # the lateral term is seen


def test_every_layer_boundary_of_the_suffix_has_an_adapter():
    method = make("none")
    learn(method, FIRST)
    learn(method, SECOND)
    adapters = {name: (a.v.in_channels, a.v.out_channels) for name, a in method.adapters[1].items()}
    assert adapters == {"stem": (4, 4), "layer1": (4, 4), "layer2": (8, 8), "layer3": (16, 16), "layer4": (32, 32)}
    learn(method, THIRD)
    assert method.adapters[2]["layer3"].v.in_channels == 32  # of two columns
    assert set(make("layer2.0").boundaries.values()) == {"layer2", "layer3", "layer4"}


def test_with_every_block_frozen_a_column_is_only_a_head():
    method = make("layer4")
    learn(method, FIRST)
    logits = method.predict(BATCH)
    learn(method, SECOND)
    assert method.boundaries == {}
    assert torch.equal(method.predict(BATCH)[:, :2], logits[:, :2])
    assert method.trainable().keys() == {"fc.weight", "fc.bias"}


def test_only_the_last_column_and_its_adapters_are_trained():
    method = make()
    for context in (FIRST, SECOND):
        learn(method, context)
    method.begin_task(THIRD)
    stir_(method, 2)
    before = toys.copy_of(method.state_dict())
    method.network.train()
    method.loss(THIRD.task.train.load(slice(0, 8)), THIRD).backward()
    with_gradient = {name for name, p in method.trainable().items() if p.grad is not None and p.grad.abs().sum() > 0}
    assert {"adapter.layer4.u.weight", "adapter.layer4.v.weight", "layer4.0.conv1.weight"} <= with_gradient
    for column in method.frozen:
        assert all(p.grad is None for p in (*column.suffix.parameters(), *column.head.parameters()))
    moved = toys.changed(method.state_dict(), before)  # batch-norm of the earlier columns must not
    assert moved == {f"adapter/2/layer4.norm.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}


def test_columns_share_a_frozen_prefix():
    method = make()
    learn(method, FIRST)
    learn(method, SECOND)
    assert method.frozen[0].layer3[1] is method.network.layer3[1]
    assert method.frozen[0].layer4[0] is not method.network.layer4[0]
    assert not any("layer3" in name for name in method.state_dict())


def test_restored_in_the_middle_of_a_task():
    method = make()
    learn(method, FIRST)
    learn(method, SECOND)
    restored = make()
    restored.network.load_state_dict(method.network.state_dict())
    restored.load_state_dict(toys.copy_of(method.state_dict()))
    restored.network.eval()
    toys.assert_same(restored.state_dict(), method.state_dict())
    assert torch.equal(restored.predict(BATCH), method.predict(BATCH))
    assert restored.trainable().keys() == method.trainable().keys()
    for one in (method, restored):
        learn(one, THIRD)
    toys.assert_same(restored.state_dict(), method.state_dict())
    toys.assert_same(restored.network.state_dict(), method.network.state_dict())


def test_adapters_do_not_depend_on_the_global_generator():
    states = []
    for seed in (1, 2):
        method = make()
        learn(method, FIRST)
        torch.manual_seed(seed)
        method.begin_task(SECOND)
        states.append(method.state_dict())
    toys.assert_same(*states)


def test_class_incremental_tests_are_refused():
    assert toys.scenario(method={"name": "pnn"}).settings == ("til",)
    with pytest.raises(ValidationError, match="method pnn answers only where the task is known"):
        toys.scenario(method={"name": "pnn"}, stream={"settings": "til+cil"})


def test_cost():
    assert PNNParameters().cost() == StepCost(columns=True, weight_copies=1)


def test_columns_are_never_averaged():
    with pytest.raises(ValidationError, match=r"method pnn .* cannot be averaged"):
        toys.scenario(method={"name": "pnn"}, server={"aggregation": "suffix"})
