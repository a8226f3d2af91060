"""EWC on numbers worked out by hand."""

import math

import pytest
import torch

from lightcl.methods.ewc import EWCParameters
from tests.lightcl import toys
from tests.lightcl.methods import table

FIRST = table.context(0, [0, 1], seen=[0, 1])  # row 0 with label 1, row 1 with label 0
# ∂ log p(y|x) / ∂ logits = onehot - p; the mean of the squares over two samples halves each row's.
FISHER = [
    [0.1**2 / 2, 0.7**2 / 2, 0.2**2 / 2, 0.4**2 / 2],
    [0.8**2 / 2, 0.2**2 / 2, 0.2**2 / 2, 0.4**2 / 2],
    [0.0] * 4,  # no sample reads it
]


def make(**keys):
    return EWCParameters(**{"loss_classes": "all"} | keys).build(table.Table())


def test_fisher_by_hand():
    method = make()
    method.end_task(FIRST)
    assert torch.allclose(method.fisher["rows"], torch.tensor(FISHER), rtol=1e-5)
    assert torch.equal(method.anchor["rows"], table.Table().rows.detach())
    assert method.network.rows.grad is None


def test_only_the_tasks_classes_count_where_the_loss_says_so():
    """Row 0, label 1 among classes 0 and 1: p = (¼, ¾)."""
    method = make(loss_classes="task")
    method.end_task(FIRST)
    assert method.fisher["rows"][0].tolist() == pytest.approx([0.25**2 / 2, 0.25**2 / 2, 0, 0])


def test_penalty_by_hand():
    method = make(strength=4.0)
    method.end_task(FIRST)
    with torch.no_grad():
        method.network.rows[0, 1] += 0.1
        method.network.rows[2, 3] -= 5.0
    expected = 4.0 / 2 * FISHER[0][1] * 0.1**2
    assert method.penalty().item() == pytest.approx(expected, rel=1e-4)
    plain = -math.log(0.2)
    assert method.loss(table.batch([1], [0]), FIRST).item() == pytest.approx(plain + expected, rel=1e-5)


def test_gradient_of_the_penalty_by_hand():
    """λ F (θ - θ*), added to the existing gradient."""
    method = make(strength=4.0)
    method.end_task(FIRST)
    with torch.no_grad():
        method.network.rows[0, 1] += 0.1
    method.network.rows.grad = torch.full_like(method.network.rows, 7.0)
    method.before_step(table.batch([1], [0]), FIRST)
    expected = torch.full((len(FISHER), 4), 7.0)
    expected[0, 1] += 4.0 * FISHER[0][1] * 0.1
    assert torch.allclose(method.network.rows.grad, expected, rtol=1e-5)


def test_first_task_has_no_penalty():
    assert make().loss(table.batch([0], [1]), FIRST).item() == pytest.approx(-math.log(0.3), rel=1e-5)


def test_fisher_information_of_tasks_adds_up_online():
    """F <- γF + F_t, θ* <- θ; one pair of tensors whatever the number of tasks."""
    method = make(gamma=0.5)
    method.end_task(FIRST)
    with torch.no_grad():
        method.network.rows[2] += 1.0  # changes no probability
    method.end_task(table.context(1, [2, 3], [0, 1, 2, 3], rows=[2], labels=[3]))
    expected = 0.5 * torch.tensor(FISHER)
    expected[2] += torch.tensor([0.25**2, 0.25**2, 0.25**2, 0.75**2])
    assert torch.allclose(method.fisher["rows"], expected, rtol=1e-5)
    assert torch.equal(method.anchor["rows"], method.network.rows.detach())
    assert set(method.state_dict()) == {"fisher/rows", "anchor/rows"}


def test_computing_fisher_information_does_not_change_the_network():
    """Evaluation mode: no gradient stays and no running statistic moves; frozen tensors are not tied."""
    context = toys.context(0, [0, 1])
    method = EWCParameters(fisher_samples=4).build(toys.network().eval())
    before = toys.copy_of(method.network.state_dict())
    method.end_task(context)
    toys.assert_same(method.network.state_dict(), before)
    assert all(p.grad is None for p in method.network.parameters())
    assert set(method.fisher) == set(method.trainable())
    assert not any(name.startswith(("conv1", "layer1")) for name in method.fisher)
    assert method.fisher["fc.weight"][2:].abs().sum() == 0  # classes outside the loss
    assert method.fisher["fc.weight"][:2].min() >= 0
    assert method.fisher["fc.weight"].sum() > 0


def test_defaults_and_cost():
    parameters = EWCParameters()
    assert (parameters.loss_classes, parameters.gamma, parameters.cost().weight_copies) == ("task", 1.0, 2)
