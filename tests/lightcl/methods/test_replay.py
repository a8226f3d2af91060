"""ER, DER++ and FDR on numbers worked out by hand."""

import math

import pytest
import torch

from lightcl.methods.derpp import DERppParameters
from lightcl.methods.er import ERParameters
from lightcl.methods.fdr import FDRParameters, equal_shares, function_distance
from tests.lightcl import toys
from tests.lightcl.methods import table

NOW = table.context(1, [1, 2], seen=[0, 1, 2])
NEW = table.batch([0], [1])  # p over the head: 0.3; over the task: 3/5; over the classes seen: 1/2
OLD = table.batch([1], [0])  # p over the head: 0.2; over the classes seen: 1/3


def make(parameters):
    return parameters.build(table.Table())


def with_old_sample(parameters, logits=None):
    method = make(parameters)
    method.buffer.offer(OLD, NOW.task.train, NOW, logits)
    return method


@pytest.mark.parametrize(
    ("loss_classes", "new", "old"),
    [("all", 0.3, 0.2), ("seen", 1 / 2, 1 / 3), ("task", 3 / 5, 1 / 3)],  # the old sample is of no class of the task
)
def test_er_by_hand(loss_classes, new, old):
    method = with_old_sample(ERParameters(loss_classes=loss_classes))
    assert method.loss(NEW, NOW).item() == pytest.approx(-math.log(new) - math.log(old), rel=1e-5)


@pytest.mark.parametrize("parameters", [ERParameters(), DERppParameters(), FDRParameters()])
def test_without_a_memory_the_loss_is_the_cross_entropy(parameters):
    assert make(parameters).loss(NEW, NOW).item() == pytest.approx(-math.log(0.3), rel=1e-5)


def test_derpp_by_hand():
    """z' = 0, h(x') = (ln 2, ln 2, ln 2, ln 4): the mean square is (3·ln²2 + ln²4)/4."""
    method = with_old_sample(DERppParameters(alpha=0.5, beta=0.25), torch.zeros(1, 4))
    dark = (3 * math.log(2) ** 2 + math.log(4) ** 2) / 4
    expected = -math.log(0.3) + 0.5 * dark - 0.25 * math.log(0.2)
    assert method.loss(NEW, NOW).item() == pytest.approx(expected, rel=1e-5)


def test_derpp_draws_twice():
    method = make(DERppParameters(buffer_size=8, minibatch_size=2))
    method.buffer.offer(table.batch([0, 1, 2] * 2, [0, 1, 2] * 2), NOW.task.train, NOW, torch.zeros(6, 4))
    _, memory = method.forward(NEW, NOW, draws=2)
    assert [len(outputs) for outputs, _ in memory] == [2, 2]
    assert method.buffer.draws == 2
    draws = [method.forward(NEW, NOW, draws=2)[1] for _ in range(8)]
    assert any(first.labels.tolist() != second.labels.tolist() for (_, first), (_, second) in draws)


def test_derpp_keeps_the_logits_of_the_step_in_which_a_sample_came():
    method = make(DERppParameters())
    method.loss(NEW, NOW)
    with torch.no_grad():
        method.network.rows.add_(1.0)  # the optimizer's step
    method.after_step(NEW, NOW)
    assert method.buffer.rows["logits"].tolist() == [pytest.approx([0, math.log(3), math.log(2), math.log(4)])]
    assert method.logits is None


def test_er_keeps_no_logits():
    method = make(ERParameters())
    method.loss(NEW, NOW)
    method.after_step(NEW, NOW)
    assert set(method.state_dict()) == {"buffer/images", "buffer/labels", "buffer/tasks", "buffer/counters"}


def test_function_distance_by_hand():
    """softmax (0.2, 0.2, 0.2, 0.4) and (¼, ¼, ¼, ¼): sqrt(3·0.05² + 0.15²); the second sample has not moved."""
    now = table.Table().rows.detach()[[1, 2]]
    assert function_distance(now, torch.zeros(2, 4)).item() == pytest.approx(math.sqrt(0.03) / 2, rel=1e-5)


def test_fdr_by_hand():
    method = make(FDRParameters(alpha=2.0))
    method.memory = {"images": OLD.images, "logits": torch.zeros(1, 4), "tasks": torch.zeros(1)}
    expected = -math.log(0.3) + 2.0 * math.sqrt(0.03)
    assert method.loss(NEW, NOW).item() == pytest.approx(expected, rel=1e-5)


def test_fdr_stores_the_outputs_of_the_end_of_the_task():
    method = make(FDRParameters(buffer_size=2))
    method.end_task(table.context(0, [0, 1], seen=[0, 1]))
    rows = method.memory["images"].flatten().tolist()
    assert sorted(rows) == [0, 1]
    assert torch.equal(method.memory["logits"], table.Table().rows.detach()[rows])


def test_fdr_shares_its_memory_between_the_tasks():
    assert [equal_shares(15, tasks) for tasks in (1, 2, 4)] == [[15], [8, 7], [4, 4, 4, 3]]
    method = make(FDRParameters(buffer_size=5))
    first = table.context(0, [0, 1], [0, 1], rows=[0] * 9, labels=[0] * 9)
    method.end_task(first)
    with torch.no_grad():
        method.network.rows.add_(1.0)
    method.end_task(table.context(1, [2, 3], [0, 1, 2, 3], rows=[2] * 9, labels=[2] * 9))
    assert method.memory["tasks"].tolist() == [0, 0, 0, 1, 1]
    assert method.memory["images"].flatten().tolist() == [0, 0, 0, 2, 2]
    assert torch.equal(method.memory["logits"][0], table.Table().rows.detach()[0])  # not what it says now


def test_fdr_shares_its_memory_between_the_tasks_that_a_device_learns():
    """Of tasks 1, 4 and 5, 5 rows are divided 5, then 3 + 2, then 2 + 2 + 1, as those of tasks 0, 1 and 2 would be."""
    method = make(FDRParameters(buffer_size=5))
    for task, expected in ((1, [1] * 5), (4, [1] * 3 + [4] * 2), (5, [1] * 2 + [4] * 2 + [5])):
        method.end_task(table.context(task, [0, 1], [0, 1], rows=[0] * 9, labels=[0] * 9))
        assert method.memory["tasks"].tolist() == expected


def test_fdr_has_a_memory_after_a_late_first_task():
    method = make(FDRParameters(buffer_size=2))
    for task, expected in ((2, [2, 2]), (3, [2, 3]), (4, [2, 3]), (5, [2, 3])):
        method.end_task(table.context(task, [0, 1], [0, 1]))
        assert method.memory["tasks"].tolist() == expected
        assert math.isfinite(method.loss(NEW, NOW).item())


@pytest.mark.parametrize("parameters", [ERParameters(), DERppParameters()])
def test_all_samples_pass_as_one_batch(parameters):
    """They share batch-norm's statistics, and move the running ones once."""
    context = toys.context(1, [2, 3], seen=[0, 1, 2, 3])
    method = parameters.build(toys.network(freeze="none"))
    batch = context.task.train.load(slice(0, 6))
    for _ in range(2):
        method.network.train()
        method.loss(batch, context)
        method.after_step(batch, context)
    assert method.network.bn1.num_batches_tracked.item() == 2


@pytest.mark.parametrize(
    ("parameters", "replayed", "logits"),
    [
        (ERParameters(), 15, 0),
        (FDRParameters(), 15, 15),
        (DERppParameters(), 30, 15),
        (ERParameters(minibatch_size=4), 4, 0),
    ],
)
def test_cost(parameters, replayed, logits):
    cost = parameters.cost()
    assert (cost.replayed, cost.stored_images, cost.stored_logits) == (replayed, 15, logits)
